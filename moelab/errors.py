"""The errors that moelab raises on purpose.

Each message says three things: what was wrong, what was expected, and what to do about it.
Every class also derives from the built-in exception that a caller would try first, so
`except ValueError` keeps working for someone who has never read this file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoelabError(Exception):
    """Base of every error that moelab raises on purpose."""


class ShapeError(MoelabError, ValueError):
    """A tensor's rank or size, or a model's sizes, do not fit together."""


class ShardError(ShapeError):
    """A size is not divisible by the tensor- or expert-parallel degree asked for."""


class DtypeError(MoelabError, TypeError):
    """A dtype that the operation does not take, or dtypes that differ where they must agree."""


class FormatError(MoelabError, ValueError):
    """Weights in a format that cannot be read, or that nothing here takes yet."""


class DeviceError(MoelabError, ValueError):
    """A tensor lies on the wrong device, or tensors lie on different ones."""


class DeviceFileError(MoelabError, ValueError):
    """A file of data/devices that does not describe a device."""


class LayoutError(MoelabError, ValueError):
    """A tensor is not contiguous, or not aligned, where the kernel needs it to be."""


class RoutingError(MoelabError, ValueError):
    """Expert ids out of range, top_k over the number of experts, or a routing file nobody can use."""


class ConfigError(MoelabError, ValueError):
    """A kernel configuration that breaks a rule of validity."""


class SharedMemoryError(ConfigError):
    """A kernel configuration that needs more shared memory than the chip gives one block."""


class WorkspaceError(MoelabError, MemoryError):
    """A kernel's workspace does not fit the memory that is left, or is smaller than the kernel needs."""


class ConfigFileError(MoelabError, ValueError):
    """A tuned-config file that cannot be read as one."""


class UnknownArchitectureError(MoelabError, LookupError):
    """A config.json whose MoE sizes allow no reading, or more than one."""

    __str__ = Exception.__str__  # LookupError's KeyError-like repr would hide line breaks


class UnknownModelError(MoelabError, LookupError):
    """A name that is neither a preset, nor a path to a config.json, nor a Hugging Face id at hand."""


class UnknownNameError(MoelabError, LookupError):
    """A name outside an explicit table: an implementation, a routing, a suite, a device."""


class RecordingError(MoelabError, ValueError):
    """A recording that is missing, truncated, of another schema, or holds values that are no numbers."""


class JournalError(MoelabError, OSError):
    """A tuning run's journal that cannot be written, read, resumed, or shared by two tuners."""


class LandscapeError(MoelabError, ValueError):
    """A recorded tuning landscape that is missing, damaged, or holds no answer to what was asked."""


class FolderError(MoelabError, OSError):
    """An environment variable that names no folder."""


class WriteError(MoelabError, OSError):
    """A folder that another process is writing into, or that holds a write cut short which cannot be put back."""


class OptionError(MoelabError, ValueError):
    """An argument of the command line that says nothing."""


class RuntimeModeError(MoelabError, RuntimeError):
    """What was asked cannot run here: no GPU, bf16 under Triton's interpreter, a package that is missing."""


class KernelTimeoutError(MoelabError, TimeoutError):
    """A wait inside a kernel that lasted seconds: the kernel ended itself, and the process's CUDA context with it."""


class PrecisionError(MoelabError, AssertionError):
    """A result is further from float64 than its tolerance policy allows."""


def counted(count: int, noun: str) -> str:
    """A number and its noun, the plural by an s: "1 config file", "2 config files"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean a, b?` for the known names closest to `name`, or an empty string."""
    if len(name) > 200:
        return ""  # comparing takes the square of the length, and no name is like that
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.45)
    return f" Did you mean {', '.join(lowered[c] for c in close)}?" if close else ""
