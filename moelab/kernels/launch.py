"""Launching a kernel again and again at little host time: checks and Triton's argument handling are done once.

In eager decode the GPU waits for Python: of 43.8 us for one classic launch on an H200's host (the recording
`tma_overhead` has the figures of today), Triton spent some 40 % on finding the compiled instance by looking at every
argument, and the launcher's checks 15 %. Both depend on shapes, dtypes and constants only, which repeat from step to
step.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

from collections.abc import Callable, Hashable, Mapping, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from moelab.config import KernelConfig  # noqa: E402
from moelab.kernels import checks  # noqa: E402
from moelab.routing import Alignment  # noqa: E402

Instance = tuple[Mapping[str, Any], Mapping[str, Any]]
"""What one compiled instance is made with: constants by name, launch options by name."""


class Launcher:
    """The compiled instances of one Triton kernel, by what they were compiled for.

    The kernel's parameters are tensors, descriptors, integers and None first, and then constants. The first call with
    a key goes through Triton, which compiles if need be; later ones go straight to that instance. Where Triton's
    interpreter runs, or a profiler has hooked itself into launches, every call goes through Triton.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._instances: dict[Hashable, tuple[Any, ...]] = {}

    def __call__(
        self, key: Hashable, grid: tuple[int, ...], arguments: Sequence[Any], instance: Callable[[], Instance]
    ) -> None:
        """Launch on the current stream. The first argument is a tensor on the current device (DeviceError).

        key: all that decides the instance, except what is seen here (the device, which arguments are None, and which
        pointers are multiples of 16): dtypes, constants, options, and integers that Triton specialises on.
        instance: constants and options, asked for when the key is new.
        """
        device = arguments[0].get_device()
        pointers = 0
        passed = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                passed.append(address)
                pointers = pointers * 3 + (1 if address & 15 else 2)
            else:
                passed.append(argument)
                pointers *= 3
        found = self._instances.get((key, device, pointers))
        if found is None or _hooked():
            self._through_triton((key, device, pointers), grid, arguments, instance)
            return
        if torch.cuda.current_device() != device:
            checks.check_kernel_device("the first argument", arguments[0])
        run, function, metadata, constants = found
        x, y, z = (*grid, 1, 1)[:3]
        stream = triton.runtime.driver.active.get_current_stream(device)
        run(x, y, z, stream, function, metadata, None, None, None, *passed, *constants)

    def _through_triton(
        self, key: Hashable, grid: tuple[int, ...], arguments: Sequence[Any], instance: Callable[[], Instance]
    ) -> None:
        constants, options = instance()
        compiled = self.kernel[grid](*arguments, **constants, **options)
        if compiled is None:  # the interpreter has nothing to keep
            return
        in_order = [constants[name] for name in self.kernel.arg_names[len(arguments) :]]
        self._instances[key] = (compiled.run, compiled.function, compiled.packed_metadata, in_order)


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches (triton.knobs.runtime, Triton 3.6 and later)."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


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
    """Shape, dtype, device and contiguity of each: all of a tensor that checks look at."""
    return tuple([None if t is None else (t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors])


def gemm_signature(
    a: Tensor, w: Tensor, alignment: Alignment, config: KernelConfig, *rest: Tensor | None
) -> tuple[Any, ...]:
    """`signature` of a grouped product's operands, its alignment and its config."""
    return (
        config, alignment.block_size, alignment.num_pairs, alignment.num_experts,
        *signature(
            a, w, alignment.sorted_token_ids, alignment.expert_ids, alignment.num_tokens_post_padded, *rest
        ),
    )  # fmt: skip
