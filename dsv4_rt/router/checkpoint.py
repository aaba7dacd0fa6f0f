"""A layer's gate out of a released checkpoint: safetensors files, or a mapping of names to arrays.

Names: layers.{layer}.ffn.gate.weight [E, K] bfloat16, .bias [E] float32 (dense layers), .tid2eid [V, k] int64 (hash
layers), under any prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv4_rt.errors import ArgumentError

INDEX = "model.safetensors.index.json"
PARTS = ("weight", "bias", "tid2eid")


def gate(source: str | Path | Mapping[str, Any], layer: int, parts: Sequence[str]) -> dict[str, Any]:
    """The named parts of a layer's gate; only they are read.

    Raises:
        ArgumentError: the source cannot be read, has no such layer, has it twice, or its gate lacks a part or has one
            that is not asked for (weight apart).
    """
    names: dict[str, Any] = _files(source) if isinstance(source, str | Path) else dict.fromkeys(source)
    found: dict[str, str] = {}
    for part in PARTS:
        tail = f"layers.{layer}.ffn.gate.{part}"
        keys = [name for name in names if name == tail or name.endswith("." + tail)]
        if len(keys) > 1:
            raise ArgumentError(f"Router.load_checkpoint: {tail} is there {len(keys)} times: {', '.join(sorted(keys))}")
        if keys:
            found[part] = keys[0]
    lacking = [part for part in parts if part not in found]
    surplus = [part for part in found if part not in parts and part != "weight"]
    if lacking or surplus:
        raise ArgumentError(
            f"Router.load_checkpoint: layer {layer} has gate.{{{', '.join(found) or 'nothing'}}}; this router takes "
            f"{', '.join(parts)} (dense layers have weight and bias, hash layers weight and tid2eid)"
        )
    if not isinstance(source, str | Path):
        return {part: source[found[part]] for part in parts}
    return {part: _read(names[found[part]], found[part]) for part in parts}


def _files(source: str | Path) -> dict[str, Any]:
    """Every tensor's name and the file it is in."""
    path = Path(source)
    index = path / INDEX
    if index.is_file():
        with _readable(index):
            return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ArgumentError(f"Router.load_checkpoint: {str(source)!r} is no .safetensors file and no directory of them")
    names = {}
    for file in files:
        with _opened(file) as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def _read(file: Path, name: str) -> Any:
    with _opened(file) as tensors:
        return tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with _readable(file), safe_open(str(file), framework="numpy") as tensors:
        yield tensors


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """A file that is missing, cut off or damaged, as an ArgumentError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArgumentError(f"Router.load_checkpoint: {str(file)!r} cannot be read: {error}") from error
