"""How the weights of a layer's experts are stored, as data: one frozen record for each format, and one table of them.

A format says what one weight is (dtype, bits, packing, zero points), what shares one scale, what becomes of the
activations, and what a config file's name says of it. Block and group sizes are data: `get_format` takes any.
Sources: the fused MoE Triton kernels and launchers of sglang 0.5.23 and vLLM 0.33.0, the OCP microscaling specification
v1.0 for mxfp4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moelab.dtypes import dtype_bytes
from moelab.errors import FormatError, nearest_names

Granularity = Literal["none", "tensor", "channel", "group", "block"]
Activations = Literal["none", "static", "tensor", "token", "group"]

_NAME = re.compile(r"(?P<family>[a-z0-9_]+?)(?:_(?P<sizes>\d+(?:x\d+)?))?(?P<zp>_zp)?(?P<ue8m0>_ue8m0)?")
_SIZES = {"none": 0, "tensor": 0, "channel": 0, "group": 1, "block": 2}


@dataclass(frozen=True)
class Format:
    """How experts' weights are stored, and what becomes of the activations that meet them.

    family: the format's name without sizes. weight_dtype: of the stored values, torch's spelling; None for plain weights,
        whose dtype is the shape's. bits: of one weight; where two share a byte (uint8), the low half is the even column's.
    granularity: what shares one scale: an expert's whole matrix ("tensor"), one of its rows ("channel"), `sizes[0]`
        neighbours in a row ("group"), or a block of `sizes` rows and columns ("block").
    scale_dtype: of the weights' scales. zero_points: whether each scale has a zero point, of `bits` bits.
    power_of_two_scales: scales are powers of two (`scale_fmt` "ue8m0" in a config.json), stored as scale_dtype.
    activations: "none" (they stay 16-bit), one scale from the checkpoint ("static"), or scales made at run time for the
        whole batch ("tensor"), a token ("token"), or a token and `sizes[-1]` neighbours ("group").
    selector: what follows `dtype=` in a config file's name; per_channel_quant: whether the name says so. file: whether the
        peers' Triton kernels take the format, so that a file is asked for at all. served_by: what a server runs otherwise.
    """

    family: str
    weight_dtype: str | None
    bits: int
    granularity: Granularity
    activations: Activations
    selector: str | None = None
    sizes: tuple[int, ...] = ()
    scale_dtype: str = "float32"
    zero_points: bool = False
    power_of_two_scales: bool = False
    per_channel_quant: bool = False
    file: bool = True
    served_by: str = ""

    def __post_init__(self) -> None:
        wanted = _SIZES[self.granularity]
        if len(self.sizes) != wanted or any(type(size) is not int or size < 1 for size in self.sizes):
            raise FormatError(
                f"{self.family} has the sizes {list(self.sizes)}. Expected {wanted} whole numbers of at least 1, for a scale "
                f"of its serves a {self.granularity}. Correct them."
            )

    @property
    def name(self) -> str:
        """The format's name with its sizes, as in "fp8_w8a8_block_128x128"; `get_format` reads it back."""
        sizes = f"_{'x'.join(map(str, self.sizes))}" if self.sizes else ""
        return self.family + sizes + "_zp" * self.zero_points + "_ue8m0" * self.power_of_two_scales

    @property
    def is_plain(self) -> bool:
        """Whether weights are 16-, 32- or 64-bit floats without scales."""
        return self.granularity == "none"

    def product_dtype(self, dtype: str) -> str:
        """What a GEMM multiplies: the codes' dtype where activations are quantised too, else the activations' own."""
        return dtype if self.activations == "none" or self.weight_dtype is None else self.weight_dtype

    @property
    def widened_bits(self) -> int | None:
        """Bits of a stored weight where a GEMM widens it to the activations' dtype; None where it multiplies what is stored."""
        return None if self.is_plain or self.activations != "none" else self.bits

    def stored_shapes(
        self, num_experts: int, rows: int, columns: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of codes, scales and zero points of (E, rows, columns) weights; () for what the format has not."""
        codes = (num_experts, rows, columns // self.values_per_byte)
        if self.granularity in ("none", "tensor"):
            return codes, () if self.is_plain else (num_experts,), ()
        if self.granularity == "channel":
            return codes, (num_experts, rows), ()
        if self.granularity == "block":
            return codes, (num_experts, -(-rows // self.sizes[0]), -(-columns // self.sizes[1])), ()
        scales = (num_experts, rows, columns // self.sizes[0])
        return codes, scales, (num_experts, rows * self.bits // 8, scales[2]) if self.zero_points else ()

    def activation_scales(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of (rows, columns) activations that are quantised: () where one serves them all."""
        if self.activations == "token":
            return rows, 1
        return (rows, -(-columns // self.sizes[-1])) if self.activations == "group" else ()

    def step_refused(self, step: int) -> str | None:
        """Why no kernel takes `step` columns of K at a time, a clause; None where one does.

        A step of codes with scales by blocks has one scale of each operand; weights in groups are widened before the product,
        so that a step may also be several whole groups.
        """
        group = self.sizes[-1] if self.sizes else step
        if not group % step or (self.activations == "none" and not step % group):
            return None
        if self.activations == "none":
            return f"BLOCK_SIZE_K = {step} and groups of {group} along K, of which neither divides the other"
        return f"BLOCK_SIZE_K = {step} and scales by groups of {group} along K: a step has one scale"

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """As the peers' launchers pass it: (n, k) of a block, (0, g) for groups, which file names leave out, else None."""
        if self.granularity == "block":
            return self.sizes[0], self.sizes[1]
        return (0, self.sizes[0]) if self.granularity == "group" and self.file else None

    @property
    def values_per_byte(self) -> int:
        """Weights that share a stored byte: w2's last dimension is N divided by this."""
        return 2 if self.bits == 4 else 1

    def dtype_selector(self, dtype: str) -> str | None:
        """What follows `dtype=` in sglang's names; for plain weights "float32" in 32 bits (float64 shares it), else None."""
        if not self.is_plain:
            return self.selector
        return "float32" if dtype in ("float32", "float64") else None

    def matrix_bytes(self, rows: int, columns: int, dtype: str = "bfloat16") -> int:
        """Bytes of one expert's matrix of rows (outputs) and columns (inputs): values, scales and zero points.

        dtype: of plain weights. A block or group that the matrix cuts counts whole.
        """
        if self.is_plain:
            return rows * columns * dtype_bytes(dtype)
        scales = self._scales(rows, columns)
        zero_points = -(-scales * self.bits // 8) if self.zero_points else 0
        return rows * -(-columns * self.bits // 8) + scales * dtype_bytes(self.scale_dtype) + zero_points

    def _scales(self, rows: int, columns: int) -> int:
        if self.granularity == "block":
            return -(-rows // self.sizes[0]) * -(-columns // self.sizes[1])
        if self.granularity == "group":
            return rows * -(-columns // self.sizes[0])
        return rows if self.granularity == "channel" else 1

    def require_static_scale(self, given: bool) -> None:
        """Raise FormatError unless a checkpoint's scale of the activations is given just where the format has one."""
        if given != (self.activations == "static"):
            has, wanted = ("a", "none: its scales come from the activations") if given else ("no", "the checkpoint's")
            raise FormatError(f"{self.name} was given {has} static_scale. Expected {wanted}. Pass what the format has.")

    def misfits(self, hidden_size: int, moe_intermediate_size: int) -> tuple[str, ...]:
        """What no block or group divides, in sentences; empty if the sizes of a rank's layer fit.

        GEMM1 reads w13 (2N, H), GEMM2 w2 (H, N): the gate's and the up rows start at a block's border only if N is a
        multiple of the block's rows, and N is the inner size of GEMM2. H may end within a block of rows, N never.
        """
        n, h, label = moe_intermediate_size, hidden_size, "block" if self.granularity == "block" else "group"
        wanted = [("moe_intermediate_size", n, size, f"{label} of {size}") for size in dict.fromkeys(self.sizes)]
        wanted += [("hidden_size", h, self.sizes[-1], f"{label} of {self.sizes[-1]}")] if self.sizes else []
        wanted += [
            (f, s, 2, "pair in a byte") for f, s in (("moe_intermediate_size", n), ("hidden_size", h)) if self.bits == 4
        ]
        return tuple(
            f"{field} of a rank is {size}, which no whole number of a {of} makes"
            for field, size, step, of in wanted
            if size % step
        )


def _block(family: str, dtype: str, selector: str) -> Format:
    return Format(family, dtype, 8, "block", "group", selector, (128, 128))


_MARLIN = "Marlin, unless its Triton kernel is asked for (sglang: --quantization moe_wna16)"

PLAIN = Format("plain", None, 16, "none", "none")
"""bfloat16, float16, float32 or float64, as the shape's dtype says."""

_FP8 = "float8_e4m3fn"

FAMILIES: Mapping[str, Format] = {
    each.family: each
    for each in (
        PLAIN,
        Format("fp8_w8a8_tensor", _FP8, 8, "tensor", "tensor", "fp8_w8a8"),
        Format("fp8_w8a8_tensor_static", _FP8, 8, "tensor", "static", "fp8_w8a8"),
        Format("fp8_w8a8_channel", _FP8, 8, "channel", "token", "fp8_w8a8", per_channel_quant=True),
        _block("fp8_w8a8_block", _FP8, "fp8_w8a8"),
        Format("int8_w8a8_channel", "int8", 8, "channel", "token", "int8_w8a8", per_channel_quant=True),
        _block("int8_w8a8_block", "int8", "int8_w8a8"),
        Format("int8_w8a16_channel", "int8", 8, "channel", "none", "int8_w8a16"),
        Format("int8_w8a16_group", "uint8", 8, "group", "none", "int8_w8a16", (128,), "bfloat16", served_by=_MARLIN),
        Format("int4_w4a16_group", "uint8", 4, "group", "none", "int4_w4a16", (128,), "bfloat16", served_by=_MARLIN),
        Format(
            "mxfp4_w4a16", "uint8", 4, "group", "none", None, (32,), "float8_e8m0fnu", file=False,
            served_by="kernels that read no such file (triton_kernels, Marlin, FlashInfer)",
        ),
    )
}  # fmt: skip
"""The families of formats, each with the sizes that are usual."""

FORMATS: Mapping[str, Format] = {
    each.name: each
    for family in FAMILIES.values()
    for each in (
        [replace(family, sizes=(g,), zero_points=zp) for g in (32, 64, 128) for zp in (False, True)]
        if family.family == "int4_w4a16_group"
        else [family]
    )
}
"""The table: name -> format, int4 at each usual group, symmetric and with zero points. `get_format` takes other sizes."""


def _is_made(format: Format) -> bool:
    """Whether some checkpoint stores it: zero points are of integers in groups, scales as powers of two of fp8 in blocks, where
    mxfp4's are by definition, over 32 values (OCP microscaling specification v1.0, section 5.2)."""
    if format.family == "mxfp4_w4a16":
        return format == FAMILIES["mxfp4_w4a16"]
    return (not format.zero_points or format.granularity == "group") and (
        not format.power_of_two_scales or format.family == "fp8_w8a8_block"
    )


def get_format(name: str | Format) -> Format:
    """The format of that name, with whatever sizes stand in it ("fp8_w8a8_block_64x64", "int4_w4a16_group_32_zp").

    A family's name alone means its usual sizes. Raises FormatError for any other.
    """
    if isinstance(name, Format):
        return name
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    found = FORMATS.get(name) if isinstance(name, str) else None
    if found is None and match and (family := FAMILIES.get(match["family"])) is not None:
        sizes = tuple(int(size) for size in match["sizes"].split("x")) if match["sizes"] else family.sizes
        found = replace(family, sizes=sizes, zero_points=bool(match["zp"]), power_of_two_scales=bool(match["ue8m0"]))
    if found is None or not _is_made(found):
        raise FormatError(
            f"Unknown format {name!r} of weights.{nearest_names(str(name), FORMATS)} Expected one of {', '.join(FORMATS)}, or "
            "one of those with other sizes. Name one."
        )
    return found


SELECTORS = tuple(dict.fromkeys(family.selector for family in FAMILIES.values() if family.selector))
"""What servers' tuners call quantised weights: a family of formats or several, told apart by what shares a scale."""


def format_of_selector(
    selector: str, own: Format = PLAIN, *, per_channel_quant: bool = False, block_shape: tuple[int, int] | None = None
) -> Format:
    """The format that a server's tuner means by a selector, such as "fp8_w8a8", and its switches.

    own: the checkpoint's; where it has that selector and no switch speaks, it is meant. block_shape: (n, k) of a block, (0, g)
    for groups of g along K. Without either fp8_w8a8 has a scale for each matrix, int8_w8a16 one for each channel.
    Raises FormatError for a selector that is none, and for switches that leave open, or contradict, what shares a scale.
    """
    if selector not in SELECTORS:
        raise FormatError(
            f"Unknown selector {selector!r} of weights.{nearest_names(selector, SELECTORS)} Expected one of "
            f"{', '.join(SELECTORS)}. Name one."
        )
    if own.selector == selector and not per_channel_quant and block_shape is None:
        return own
    if block_shape is not None and (block_shape[1] < 1 or block_shape[0] < 0):
        raise FormatError(
            f"A block_shape of {list(block_shape)}. Expected n k of a block, or 0 g for groups. Correct it."
        )
    if per_channel_quant and block_shape is not None:
        raise FormatError(
            f"{selector} by channel and in blocks of {list(block_shape)} at once. Expected one of --per-channel-quant and "
            "--block-shape. Leave one out."
        )
    shared = (
        "channel" if per_channel_quant else "tensor" if block_shape is None else "block" if block_shape[0] else "group"
    )
    if shared == "tensor" and selector == "int8_w8a16":
        shared = "channel"
    family = FAMILIES.get(f"{selector}_{shared}")
    if family is None:
        ways = [name.removeprefix(f"{selector}_") for name in FAMILIES if name.startswith(selector)]
        switch = {"channel": "--per-channel-quant", "group": "--block-shape 0 G", "block": "--block-shape N K"}
        say = " or ".join(switch[way] for way in ways if way in switch)
        raise FormatError(
            f"No format is {selector} with a scale a {shared}. Expected one a {' or '.join(ways)}. Pass {say}."
        )
    return replace(family, sizes=block_shape[-_SIZES[shared] :]) if block_shape else family
