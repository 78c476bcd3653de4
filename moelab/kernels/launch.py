"""Launching a kernel again and again at little host time: checks and Triton's argument handling are done once.

In eager decode the GPU waits for Python, and most of a launch's host time went to what repeats from step to step:
Triton looks at every argument to find the compiled instance, and the launcher checks shapes and dtypes. The suite
`tma_overhead` records what a launch costs now, and what it costs through Triton.
"""

from __future__ import annotations

from moelab import runtime

RUNTIME = runtime.prepare_triton()

import contextlib  # noqa: E402
import threading  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.kernels import checks  # noqa: E402
from moelab.kernels.interpreter import hasten, mend  # noqa: E402

if RUNTIME.mode == "interpreter":
    from triton.runtime import interpreter

    mend(interpreter)
    hasten(interpreter, triton.language)

OVERLAP = True
"""For measurements (tests/overlap_times.py): without it, a launch begins when the one before it has ended."""

Compilation = tuple[Mapping[str, Any], Mapping[str, Any]]
"""What an instance is compiled with: constants by name, launch options by name."""


class Launcher:
    """The compiled instances of one Triton kernel, by what they were compiled for.

    The kernel's parameters are tensors, then integers, floats and descriptors, then constants. The first call with a
    key goes through Triton, which compiles if need be; later ones go straight to that instance. How an instance takes its
    arguments is private to Triton (read in 3.6.0 and 3.7.1), so the kernel's first launch compares (`_compared`). Where
    that finds a difference, where Triton's interpreter runs, or a profiler has hooked itself into launches, every call goes
    through Triton.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._instances: dict[Hashable, tuple[Any, ...]] = {}
        self._straight: bool | None = None  # whether an instance takes what `__call__` hands it; None: not compared yet
        self._comparing = threading.Lock()  # a second thread's comparison of one instance would hide the first's launch

    def __call__(
        self,
        key: Hashable,
        grid: tuple[int, int],
        tensors: Sequence[Tensor | None],
        values: tuple[Any, ...],
        instance: Callable[[], Compilation],
        descriptors: tuple[tuple[int, Any], ...] = (),
    ) -> None:
        """Launch a (columns, rows) grid on the current stream; the first tensor is on the current device (DeviceError).

        key: all that decides the instance, except the device and which addresses are multiples of 16, which are looked
        up here: dtypes, which tensors are None, constants, options, and integers that Triton specialises on.
        instance: constants and options, asked for when the key is new.
        descriptors: (place, TMA descriptor) where a kernel takes one in the place of a tensor, which is None there.
        """
        first: Any = tensors[0]
        device = first.get_device()
        addresses: list[Any] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        union = 0
        for address in addresses:
            union |= address
        if union & 15:
            key = (key, tuple([address & 15 == 0 for address in addresses]))
        found = self._instances.get((key, device, OVERLAP))
        if found is None or _hooked():
            arguments = [*tensors, *values]
            for place, descriptor in descriptors:
                arguments[place] = descriptor
            self._through_triton((key, device, OVERLAP), grid, first, arguments, instance)
            return
        for place, descriptor in descriptors:
            addresses[place] = descriptor
        if torch.cuda.current_device() != device:
            self._check_device(first)
        run, function, metadata, constants, stream_of = found
        run(*grid, 1, stream_of(device), function, metadata, None, None, None, *addresses, *values, *constants)

    def _check_device(self, first: Tensor) -> None:
        checks.check_kernel_device(self.kernel.arg_names[0].removesuffix("_ptr"), first)

    def _overlapped(self, constants: Mapping[str, Any], options: Mapping[str, Any]) -> Compilation:
        """The instance with programmatic dependent launch where the kernel has PDL, the chip does it (since sm_90, PTX ISA,
        griddepcontrol), and its launcher has not said."""
        if "PDL" not in self.kernel.arg_names or "PDL" in constants:
            return constants, options
        target = checks.launch_target()
        overlaps = OVERLAP and RUNTIME.mode != "interpreter" and target is not None and target.has_pdl
        return {**constants, "PDL": overlaps}, {**options, **({"launch_pdl": True} if overlaps else {})}

    def _through_triton(
        self,
        key: Hashable,
        grid: tuple[int, int],
        first: Tensor,
        arguments: Sequence[Any],
        instance: Callable[[], Compilation],
    ) -> None:
        constants, options = self._overlapped(*instance())
        made = checks.COMPILED_ONLY.get()
        if made is not None:
            made.append(self.kernel.warmup(*arguments, grid=grid, **constants, **options))
            return
        self._check_device(first)
        in_order = [constants[name] for name in self.kernel.arg_names[len(arguments) :]]
        # The interpreter's numpy warns of inf and NaN; a GPU does not, and rows of padding hold what memory held.
        with np.errstate(over="ignore", invalid="ignore"):
            compiled = None
            if self._straight is None and RUNTIME.mode != "interpreter":
                with self._comparing:
                    if self._straight is None:
                        compiled = self._compared(grid, arguments, in_order, {**constants, **options})
            if compiled is None:
                compiled = self.kernel[grid](*arguments, **constants, **options)
        if compiled is None or not self._straight:  # the interpreter has nothing to keep
            return
        stream_of = triton.runtime.driver.active.get_current_stream
        self._instances[key] = (compiled.run, compiled.function, compiled.packed_metadata, in_order, stream_of)

    def _compared(
        self, grid: tuple[int, int], arguments: Sequence[Any], in_order: list[Any], named: Mapping[str, Any]
    ) -> Any:
        """Launch once through Triton, and see whether its own launch is what `__call__` would have said.

        The instance is compiled first, then launched with its `run` replaced, for this thread, by one that looks at what
        Triton passes, and launches with ours where they agree. They agree where all is the same but for tensors, which
        `__call__` gives as addresses (None as 0), and for the hooks' three arguments, which are None without hooks.
        """
        compiled = self.kernel.warmup(*arguments, grid=grid, **named)
        run, thread = compiled.run, threading.get_ident()
        differs = f"does not call {type(compiled).__name__}.run"

        def looked_at(*passed: Any, **unknown: Any) -> None:
            nonlocal differs
            if threading.get_ident() != thread:
                return run(*passed, **unknown)
            stream = triton.runtime.driver.active.get_current_stream(arguments[0].get_device())
            ours = [
                *grid,
                1,
                stream,
                compiled.function,
                compiled.packed_metadata,
                None,
                None,
                None,
                *arguments,
                *in_order,
            ]
            differs = "names its arguments" if unknown else _first_difference(passed, ours)
            if not differs:
                plain = [*ours[: _HOOKS.start], *passed[_HOOKS], *map(_address, ours[_HOOKS.stop :])]
                try:
                    return run(*plain)
                except TypeError as error:
                    differs = f"takes no addresses: {error}"
            return run(*passed, **unknown)

        compiled._run = looked_at
        try:
            self.kernel[grid](*arguments, **named)
        finally:
            compiled._run = run
        self._straight = not differs
        if differs:
            _warn_once(f"{self.kernel.__name__}: Triton's launch {differs}")
        return compiled


_HOOKS = slice(6, 9)
"""Where launch metadata and the two hooks stand among what an instance is run with."""


def _address(value: Any) -> Any:
    return 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value


def _first_difference(passed: Sequence[Any], ours: Sequence[Any]) -> str:
    """Where Triton's arguments for an instance differ from ours, in words; "" where they do not."""
    if len(passed) != len(ours):
        return f"passes {len(passed)} arguments, not {len(ours)}"
    for place, (theirs, own) in enumerate(zip(passed, ours, strict=True)):
        if place in range(_HOOKS.start, _HOOKS.stop) or theirs is own:
            continue
        if type(theirs) is not type(own) or isinstance(own, Tensor) or theirs != own:
            return f"passes {type(theirs).__name__} {theirs!r:.60} as argument {place}, not {own!r:.60}"
    return ""


_warned: set[str] = set()


def _warn_once(why: str) -> None:
    """Warn, the first time in this process only, that launches go through Triton."""
    if not _warned:
        warnings.warn(
            f"Kernels are launched through Triton {triton.__version__}, at more host time a call, because its instances take "
            f"their arguments otherwise than those of 3.6 and 3.7 ({why}). Results are the same. Install one of those, or "
            "report this.",
            RuntimeWarning,
            stacklevel=2,
        )
    _warned.add(why)


@contextlib.contextmanager
def compiling() -> Iterator[list[Any]]:
    """Inside, a launch over tensors on "meta" compiles its instance and runs nothing; yields the list of Triton's compiled
    kernels, in launch order. Such tensors pass launchers' checks of the device, and count as lying on multiples of 16 bytes,
    as torch allocates them.

    Under Triton's compiler only: its interpreter has nothing to compile.
    """
    made: list[Any] = []
    token = checks.COMPILED_ONLY.set(made)
    try:
        yield made
    finally:
        checks.COMPILED_ONLY.reset(token)


_hooks = triton.knobs.runtime


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches."""
    return bool(_hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls)


_MOST_REMEMBERED = 65536
_passed: dict[Hashable, Any] = {}


def checked(key: Hashable, check: Callable[[], Any]) -> Any:
    """What `check` returned when it last passed under this key; runs it where it never has, and lets it raise.

    key: everything that the check looks at; `signature` is its part for tensors.
    """
    try:
        return _passed[key]
    except KeyError:
        result = check()
        if len(_passed) >= _MOST_REMEMBERED:  # a server's batch sizes, times its layers, stay far below
            _passed.clear()
        _passed[key] = result
        return result


def signature(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Shape, dtype, device, contiguity and negative bit of each: all of a tensor that checks look at."""
    return tuple([
        None if t is None else (t.shape, t.dtype, t.device, t.is_contiguous(), t.is_neg()) for t in tensors
    ])  # fmt: skip
