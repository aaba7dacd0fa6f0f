"""Every exception this package raises on purpose, so that a caller can catch one family and not the rest."""

from __future__ import annotations


class Dsv4Error(Exception):
    """Base of all errors of this package."""


class ArgumentError(Dsv4Error, ValueError):
    """An argument has the wrong shape, dtype, stride, alignment, device or value; nothing was launched."""


class CompileError(Dsv4Error, RuntimeError):
    """A kernel source does not compile, or does not contain the kernel that was asked for."""


class LaunchError(Dsv4Error, RuntimeError):
    """A launch was refused before it started, or the driver returned an error for it."""


class DeviceError(Dsv4Error, RuntimeError):
    """There is no usable device, it has no code for a kernel, or its context was killed by an earlier fault."""


class EmulatorError(Dsv4Error, RuntimeError):
    """Base of what the emulator reports about a program it runs."""


class UnsupportedInstruction(EmulatorError):
    """The program uses an instruction, a modifier or a directive that the emulator does not implement."""


class KernelFault(EmulatorError):
    """The program did something that is wrong or undefined on hardware: where, by which thread, and what."""


class Deadlock(EmulatorError):
    """No thread can ever run again: the message lists who waits for what."""


class PoolError(Dsv4Error):
    """Base of what the paged memory refuses. Whenever one is raised, the pool is as it was before the call."""


class PoolExhausted(PoolError, RuntimeError):
    """Not enough free and evictable pages, slots or rows now; freeing or preempting a sequence helps."""


class UnknownSequence(PoolError, LookupError):
    """No living sequence has this id: it never had one, or it has been freed already."""


class TooLong(PoolError, ValueError):
    """Longer than max_length, or than the whole pool can hold; waiting does not help."""


class PoolMisuse(PoolError, ValueError):
    """A call that is never right: negative counts, foreign dtypes, truncation past max_draft, two threads at once."""


class SnapshotError(PoolError, ValueError):
    """A snapshot that is damaged, of another version, or of another geometry."""
