"""python -m dsv4_rt"""

from dsv4_rt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
