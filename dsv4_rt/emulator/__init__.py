"""A functional PTX emulator: runs what NVRTC emits, on NumPy, with checks a GPU has not. See README.md beside this."""

from dsv4_rt.emulator.async_ import COMPLETIONS
from dsv4_rt.emulator.machine import Entry, Machine, Module
from dsv4_rt.emulator.memory import Memory
from dsv4_rt.emulator.report import LaunchReport
from dsv4_rt.emulator.trace import Step, Tracer

__all__ = ["COMPLETIONS", "Entry", "LaunchReport", "Machine", "Memory", "Module", "Step", "Tracer"]
