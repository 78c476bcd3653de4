"""Kernel configurations: their fields, their rules of validity, and what they cost on a chip.

`violations` is the one statement of the rules; the tuner, the loader and every launcher call it. What is
legal but never wins (too many accumulators a thread) is kept apart, in `prunings`: a launcher takes such a
config, a tuner need not try it.

Field names are those of the JSON files that sglang and vLLM load; SPLIT_K is moelab's own addition.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any

from moelab.chips import Target, get_target
from moelab.dtypes import dtype_bytes
from moelab.errors import ConfigError, SharedMemoryError, nearest_names

MIN_DOT_BLOCK = 16
"""Smallest M, N and K of a `tl.dot` operand (Triton's language reference)."""

MIN_8_BIT_STEP = 32
"""Smallest K of a `tl.dot` of two 8-bit operands (min_dot_size of Triton 3.7.1's cuda backend; it compiles no smaller one)."""

NUM_WARPS = (1, 2, 4, 8, 16)
"""Warps per program that Triton's launcher and the peers' files know."""

MAX_GROUP_SIZE_M = 65536
"""Row blocks in a group, times column blocks, is computed in int32: 65,536 leaves room for 32,767 column blocks."""

MAX_ACCUMULATORS_PER_THREAD = 128
"""float32 accumulators a thread can hold before a tile spills. With the shared-memory limit of sm_90 the rule cuts
the peers' grid of 1920 to 1256."""

LARGEST_VALUE = 2**31 - 1
"""Of any field: kernels take them as int32."""


_OPTIONAL = ("SPLIT_K", "waves_per_eu", "matrix_instr_nonkdim", "kpack")
_COMPILER_CHOSEN = ("num_warps", "num_stages")


@dataclass(frozen=True)
class KernelConfig:
    """Meta-parameters of one grouped-GEMM launch; all are counts, the BLOCK_SIZE_* in elements.

    A program computes a BLOCK_SIZE_M x BLOCK_SIZE_N tile of the output, BLOCK_SIZE_K of the inner dimension
    at a time; GROUP_SIZE_M row blocks share a column of weights before the next column starts. num_warps and
    num_stages default to Triton's own choice on NVIDIA (4 and 3), which is what a file without them gets.
    SPLIT_K programs share one tile's inner dimension. The last three are AMD's and None elsewhere.

    Raises ConfigError for a value that is no integer (16.0, "16" and True are none: they would equal 16 as a key and fail in
    the compiler); whether the numbers can run is `check`'s to say.
    """

    BLOCK_SIZE_M: int
    BLOCK_SIZE_N: int
    BLOCK_SIZE_K: int
    GROUP_SIZE_M: int
    num_warps: int = 4
    num_stages: int = 3
    SPLIT_K: int = 1
    waves_per_eu: int | None = None
    matrix_instr_nonkdim: int | None = None
    kpack: int | None = None

    def __post_init__(self) -> None:
        values = tuple(self.__dict__.values())  # 1 us on 1: a tuner makes some thousands
        if not (_INTEGER.issuperset(map(type, values[:7])) and _OR_NONE.issuperset(map(type, values[7:]))):
            raise ConfigError(
                f'Not a kernel config: {"; ".join(_not_integers(self))}. Expected integers. Give 16, not 16.0, "16" or True.'
            )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept: a search of some seconds asks a million times, and the dataclass's own reads ten fields each time. The same in
        every process, which None's is not: a config is pickled with it."""
        return hash(tuple([value or 0 for value in _values(self)]))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> KernelConfig:
        """Read one entry of a config file.

        Raises ConfigError naming every missing key, unknown key, and value that is not an integer (a bool, a
        float or a string is not one). Values are not judged further: see `check`.
        """
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"A kernel config must be a JSON object, not a {type(entry).__name__}. Expected one of integers. "
                "Correct the entry."
            )
        problems = _json_problems(entry)
        if problems:
            raise ConfigError(
                f"Not a kernel config: {'; '.join(problems)}. Expected integers under "
                f"{', '.join(_REQUIRED)}, and optionally {', '.join((*_COMPILER_CHOSEN, *_OPTIONAL))}. "
                "Correct the entry, or tune the shape again."
            )
        return cls(**dict(entry))

    def to_json(self) -> dict[str, int]:
        """The entry as sglang writes it: SPLIT_K and AMD's keys only where they are set away from the default."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.SPLIT_K == 1:
            del values["SPLIT_K"]
        return {k: v for k, v in values.items() if v is not None}

    def short(self) -> str:
        """A label for tables and plots, e.g. "16x64x128 g1 w4 s3", with " k2" for SPLIT_K = 2. `SHORT` says how it is read."""
        label = f"{self.BLOCK_SIZE_M}x{self.BLOCK_SIZE_N}x{self.BLOCK_SIZE_K} g{self.GROUP_SIZE_M}"
        label += f" w{self.num_warps} s{self.num_stages}"
        if self.SPLIT_K != 1:
            label += f" k{self.SPLIT_K}"
        return label + (f" e{self.waves_per_eu}" if self.waves_per_eu is not None else "")


SHORT = "rows x columns x inner of a tile, g: group, w: warps, s: stages"
"""What the parts of `KernelConfig.short` are, for a figure whose labels are such."""

_INTEGER, _OR_NONE = {int}, {int, type(None)}  # the types themselves: a bool is an int's subclass
_KEYS = tuple(f.name for f in fields(KernelConfig))
_values = attrgetter(*_KEYS)
_REQUIRED = tuple(k for k in _KEYS if k not in (*_OPTIONAL, *_COMPILER_CHOSEN))


def _json_problems(entry: Mapping[str, Any]) -> list[str]:
    problems = [f"missing key {key!r}" for key in _REQUIRED if key not in entry]
    for key, value in entry.items():
        if key not in _KEYS:
            problems.append(f"unknown key {key!r}{nearest_names(str(key), _KEYS)}")
        elif type(value) is not int:  # bool is a subclass of int and would pass isinstance
            problems.append(f"{key} is {value!r:.60} ({type(value).__name__}), not an integer")
        elif abs(value) > LARGEST_VALUE:
            problems.append(f"{key} is beyond {LARGEST_VALUE}, which no launch takes")
        if len(problems) > 8:
            return [*problems, "and more"]
    return problems


def shared_memory_bytes(
    config: KernelConfig,
    dtype: str,
    target: str | Target,
    *,
    dots: int = 1,
    weight_bits: int | None = None,
) -> int:
    """Shared memory in bytes that one program of the compatible kernel takes for operands of `dtype`.

    tile = (BLOCK_SIZE_M + BLOCK_SIZE_N) * BLOCK_SIZE_K * bytes. The pipeline keeps num_stages - 1 tiles where
    the dot reads registers (mma.sync, AMD), num_stages where it reads shared memory itself: sm_90 and sm_100,
    from 64 rows and four warps (sm_100: not with sixteen), in 8- and 16-bit dtypes (and in TF32, which no kernel here
    asks for). dots: products a step, each with barriers of its own where there are any; gated_gemm has two.
    weight_bits: of weights that are stored narrower than `dtype` and widened in the loop: at least what those take. Of them
    num_stages - 1 tiles are kept as stored; where the dot reads shared memory itself one more lies there, widened.
    Source: `metadata.shared` of Triton 3.7.1, compiled ahead of time for sm_80/90/100/120 and gfx942/950:
    exact for BLOCK_SIZE_K >= 32 and num_stages >= 2. Two bounds are loose: with BLOCK_SIZE_K = 16 the
    epilogue's scratch can be the larger one (up to the output tile, under every limit here), and AMD with one
    stage may need less.
    """
    target, element = get_target(target), dtype_bytes(dtype)
    a_bytes = config.BLOCK_SIZE_M * config.BLOCK_SIZE_K * element
    b_bytes = config.BLOCK_SIZE_N * config.BLOCK_SIZE_K * element
    stored = b_bytes if weight_bits is None else config.BLOCK_SIZE_N * config.BLOCK_SIZE_K * weight_bits // 8
    if target.is_amd and config.num_stages == 1:
        return max(a_bytes, stored)  # not pipelined: the operands pass through one buffer, one after the other
    if element <= 2 and config.BLOCK_SIZE_M >= 64 and config.num_warps in target.wide_dot_warps:
        of_weights = stored * config.num_stages if weight_bits is None else stored * (config.num_stages - 1) + b_bytes
        return config.num_stages * a_bytes + of_weights + dots * target.barrier_bytes
    return max(1, config.num_stages - 1) * (a_bytes + stored)


def tma_shared_memory_bytes(config: KernelConfig, dtype: str, target: str | Target) -> int:
    """At most what a program takes that reads its operands through TMA: shared_memory_bytes, its barriers, and more.

    Two operands have up to 32 bytes of barriers a stage, those of tcgen05 with them; float32 and float64 weights, which
    no tensor core reads from shared memory here, pass through another buffer. Source: as `shared_memory_bytes`, compiled
    for sm_90 and sm_100; loose by up to 32 bytes a stage in 16 bits.
    """
    element = dtype_bytes(dtype)
    buffer = config.BLOCK_SIZE_N * config.BLOCK_SIZE_K * element if element > 2 else 0
    return shared_memory_bytes(config, dtype, target) + 32 * config.num_stages + buffer


def accumulators_per_thread(config: KernelConfig, target: str | Target = "sm_90") -> float:
    """float32 accumulators that each thread of a program holds: BLOCK_SIZE_M * BLOCK_SIZE_N / threads."""
    threads = config.num_warps * get_target(target).threads_per_warp
    return config.BLOCK_SIZE_M * config.BLOCK_SIZE_N / threads


def prunings(config: KernelConfig, *, target: str | Target = "sm_90") -> tuple[str, ...]:
    """Reasons why a legal config cannot win, so that a tuner need not time it; empty if there are none."""
    held = accumulators_per_thread(config, target)
    if held <= MAX_ACCUMULATORS_PER_THREAD:
        return ()
    return (
        f"{held:g} accumulators a thread, over {MAX_ACCUMULATORS_PER_THREAD}: "
        f"the {config.BLOCK_SIZE_M}x{config.BLOCK_SIZE_N} tile spills with {config.num_warps} warps",
    )


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _not_integers(config: KernelConfig) -> list[str]:
    values = {f: getattr(config, f.name) for f in fields(config)}
    return [
        f"{f.name} is {value!r} ({type(value).__name__}), not an integer"
        for f, value in values.items()
        if type(value) is not int and not (value is None and f.default is None)
    ]


def _field_violations(config: KernelConfig, *, uses_dot: bool) -> list[str]:
    broken = []
    smallest = MIN_DOT_BLOCK if uses_dot else 1
    for name in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K"):
        value = getattr(config, name)
        if not _is_power_of_two(value):
            broken.append(f"{name} = {value} is not a power of two (tl.arange takes no other length)")
        elif value < smallest:
            broken.append(f"{name} = {value} is under {smallest} (the smallest side of a tl.dot)")
    if not 1 <= config.GROUP_SIZE_M <= MAX_GROUP_SIZE_M:
        broken.append(f"GROUP_SIZE_M = {config.GROUP_SIZE_M} is not in 1 ... {MAX_GROUP_SIZE_M}")
    if config.num_warps not in NUM_WARPS:
        broken.append(f"num_warps = {config.num_warps} is not one of {', '.join(map(str, NUM_WARPS))}")
    if config.num_stages < 1:
        broken.append(f"num_stages = {config.num_stages} is under 1")
    # Any count would compute right; powers of two keep each part's share of K a whole number of blocks for
    # the sizes models have, and keep the number of compiled kernels, and the tuner's space, small.
    if not _is_power_of_two(config.SPLIT_K):
        broken.append(f"SPLIT_K = {config.SPLIT_K} is not a positive power of two")
    return broken + _amd_violations(config)


def _amd_violations(config: KernelConfig) -> list[str]:
    broken = []
    if config.waves_per_eu is not None and not 0 <= config.waves_per_eu <= 8:
        broken.append(f"waves_per_eu = {config.waves_per_eu} is not in 0 ... 8 (0 lets the compiler choose)")
    if config.matrix_instr_nonkdim is not None and config.matrix_instr_nonkdim not in (0, 16, 32):
        broken.append(f"matrix_instr_nonkdim = {config.matrix_instr_nonkdim} is not 0, 16 or 32")
    if config.kpack is not None and config.kpack not in (1, 2):
        broken.append(f"kpack = {config.kpack} is not 1 or 2")
    return broken


def _block_shape_violations(config: KernelConfig, block_shape: tuple[int, int] | None) -> list[str]:
    if block_shape is None or not all(block_shape):
        return []
    block_n, block_k = block_shape
    broken = []
    if block_k % config.BLOCK_SIZE_K:
        broken.append(
            f"BLOCK_SIZE_K = {config.BLOCK_SIZE_K} does not divide the quantisation block's {block_k}: "
            "one K step would need two scales"
        )
    if block_n % config.BLOCK_SIZE_N and config.BLOCK_SIZE_N % block_n:
        broken.append(f"BLOCK_SIZE_N = {config.BLOCK_SIZE_N} and the quantisation block's {block_n} do not divide")
    return broken


def _split_violations(config: KernelConfig, K: int) -> list[str]:
    blocks = -(-K // config.BLOCK_SIZE_K)
    if blocks >= config.SPLIT_K or config.SPLIT_K == 1:
        return []
    return [
        f"SPLIT_K = {config.SPLIT_K} leaves empty slices: K = {K} has {blocks} "
        f"block{'s' if blocks > 1 else ''} of BLOCK_SIZE_K = {config.BLOCK_SIZE_K}"
    ]


def _chip_violations(config: KernelConfig, dtype: str, target: Target, weight_bits: int | None) -> list[str]:
    broken = []
    threads, limit = config.num_warps * target.threads_per_warp, target.max_threads_per_block
    if threads > limit:
        broken.append(f"{config.num_warps} warps are {threads} threads, over {target.name}'s {limit}")
    needs = shared_memory_bytes(config, dtype, target, weight_bits=weight_bits)
    limit = target.shared_memory_per_block
    if needs > limit:
        broken.append(
            f"needs {needs} bytes of shared memory in {dtype}, {target.name} gives a block {limit}: "
            "lower num_stages or a BLOCK_SIZE"
        )
    return broken


def violations(
    config: KernelConfig,
    *,
    dtype: str = "bfloat16",
    target: str | Target | None = None,
    block_shape: tuple[int, int] | None = None,
    uses_dot: bool = True,
    K: int | None = None,
    weight_bits: int | None = None,
) -> tuple[str, ...]:
    """Every rule of validity that `config` breaks, one sentence each; empty if it is valid.

    dtype: the operands', torch's spelling. target: the chip ("sm_90"); None leaves out what depends on it
    (shared memory, threads per block). block_shape: (n, k) of block-quantised weights. uses_dot: False for
    kernels that multiply and sum without `tl.dot`, whose blocks may be under 16. K: the inner size, which must
    give every one of SPLIT_K programs a block; None leaves that out. weight_bits: as
    `shared_memory_bytes` takes it. Raises UnknownNameError for an unknown
    dtype or target.
    """
    dtype_bytes(dtype)
    chip = get_target(target) if target is not None else None
    broken = _field_violations(config, uses_dot=uses_dot)
    if broken:
        return tuple(broken)  # sizes of a malformed config mean nothing
    if uses_dot and weight_bits is None and dtype_bytes(dtype) == 1 and config.BLOCK_SIZE_K < MIN_8_BIT_STEP:
        broken.append(
            f"BLOCK_SIZE_K = {config.BLOCK_SIZE_K} is under {MIN_8_BIT_STEP} (the shortest dot of 8-bit operands)"
        )
    broken += _block_shape_violations(config, block_shape)
    broken += [] if K is None else _split_violations(config, K)
    if chip is not None:
        broken += _chip_violations(config, dtype, chip, weight_bits)
    return tuple(broken)


def check(
    config: KernelConfig,
    *,
    dtype: str = "bfloat16",
    target: str | Target | None = None,
    block_shape: tuple[int, int] | None = None,
    uses_dot: bool = True,
    K: int | None = None,
    weight_bits: int | None = None,
) -> None:
    """Raise if `config` breaks a rule of `violations` (same arguments), naming every one it breaks.

    SharedMemoryError where shared memory is the only thing wrong, ConfigError otherwise.
    """
    broken = violations(
        config, dtype=dtype, target=target, block_shape=block_shape, uses_dot=uses_dot, K=K, weight_bits=weight_bits
    )
    if not broken:
        return
    only_memory = all("of shared memory" in b for b in broken)
    error = SharedMemoryError if only_memory else ConfigError
    raise error(
        f"The config {config.short()} cannot run{f' on {get_target(target).name}' if target is not None else ''}: "
        f"{'; '.join(broken)}. Expected a config without that. Change those fields, or pass config=None for the tuned "
        "or default one."
    )


@functools.lru_cache(maxsize=4096)
def default_config(num_tokens: int, num_experts: int, dtype: str = "bfloat16") -> KernelConfig:
    """The config used where no file has one: sglang's rule for unquantised weights, so that both agree.

    num_tokens <= num_experts: 16x32x64, GROUP_SIZE_M 1; more tokens: 64x64x32, GROUP_SIZE_M 8. Warps and
    stages are Triton's own (4 and 3). The rule is the same for every dtype here, and fits every target up to
    float64 (64 KiB). Raises ConfigError for sizes under 1, UnknownNameError for an unknown dtype.
    """
    dtype_bytes(dtype)
    if num_tokens < 1 or num_experts < 1:
        raise ConfigError(
            f"No config for num_tokens = {num_tokens} and num_experts = {num_experts}. Expected num_tokens >= 1 "
            "and num_experts >= 1: an empty batch launches no kernel. Skip the call."
        )
    if num_tokens <= num_experts:
        return KernelConfig(16, 32, 64, 1)
    return KernelConfig(64, 64, 32, 8)
