"""Weight formats: the table, names that are read back, bytes, and what no block divides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.errors import FormatError
from moelab.formats import FAMILIES, FORMATS, PLAIN, Format, get_format
from moelab.shapes import MoEShape, load_model, require_plain

QUANTISED = [each for each in FORMATS.values() if not each.is_plain]
SIZES = {"none": st.just(()), "tensor": st.just(()), "channel": st.just(())}
SIZES |= {"group": st.tuples(st.integers(1, 512)), "block": st.tuples(st.integers(1, 512), st.integers(1, 512))}


@st.composite
def formats(draw: st.DrawFn) -> Format:
    """Any format that a checkpoint may have: a family with sizes of its own."""
    from dataclasses import replace

    family = draw(st.sampled_from(list(FAMILIES.values())))
    zero_points = family.granularity == "group" and family.file and draw(st.booleans())
    ue8m0 = family.family == "fp8_w8a8_block" and draw(st.booleans())
    sizes = family.sizes if family.family == "mxfp4_w4a16" else draw(SIZES[family.granularity])
    return replace(family, sizes=sizes, zero_points=zero_points, power_of_two_scales=ue8m0)


@given(formats())
def test_a_format_is_read_back_by_its_name(format: Format) -> None:
    assert get_format(format.name) == format


def test_the_table_has_what_the_peers_serve() -> None:
    assert list(FORMATS) == [each.name for each in FORMATS.values()] and PLAIN.name == "plain"
    assert {each.selector for each in QUANTISED} == {"fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16", None}
    for each in QUANTISED:
        assert each.activations == "none" or each.bits == 8
        assert each.per_channel_quant == (each.granularity == "channel" and each.activations == "token")
    assert [each.name for each in QUANTISED if each.selector is None] == ["mxfp4_w4a16_32"]
    assert get_format("fp8_w8a8_block") == get_format("fp8_w8a8_block_128x128")


@pytest.mark.parametrize(
    "name",
    [
        "fp9",
        "",
        "plain_128",
        "fp8_w8a8_block_128",
        "fp8_w8a8_channel_128",
        "int8_w8a8_channel_zp",
        None,
        8,
        "plain_ue8m0",
        "mxfp4_w4a16_64",
        "mxfp4_w4a16_32_zp",
        "int4_w4a16_group_32_ue8m0",
        "int8_w8a8_block_128x128_ue8m0",
    ],
)
def test_an_unknown_format_is_refused(name: object) -> None:
    with pytest.raises(FormatError, match=r"Expected"):
        get_format(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", 256 * 384 * 2),
        ("fp8_w8a8_tensor", 256 * 384 + 4),
        ("fp8_w8a8_channel", 256 * 384 + 256 * 4),
        ("fp8_w8a8_block_128x128", 256 * 384 + 2 * 3 * 4),
        ("fp8_w8a8_block_100x100", 256 * 384 + 3 * 4 * 4),  # blocks that the matrix cuts count whole
        ("int4_w4a16_group_128", 256 * 192 + 256 * 3 * 2),
        ("int4_w4a16_group_128_zp", 256 * 192 + 256 * 3 * 2 + 256 * 3 // 2),
        ("int8_w8a16_group_128_zp", 256 * 384 + 256 * 3 * 2 + 256 * 3),
        ("mxfp4_w4a16", 256 * 192 + 256 * 12),
    ],
)
def test_bytes_of_a_matrix(name: str, expected: int) -> None:
    assert get_format(name).matrix_bytes(256, 384) == expected


def test_bytes_of_a_layer() -> None:
    """DeepSeek-V3 on one of 8 ranks: half of bf16's and the scales, one of 128 x 128."""
    shape = load_model("deepseek-v3-fp8", tp_size=8, loader="vllm")
    values = 256 * 3 * 256 * 7168
    assert shape.weight_bytes == values + 4 * values // 128**2
    assert load_model("deepseek-v3", tp_size=8, loader="vllm", dtype="float32").weight_bytes == 4 * values


def test_what_no_block_divides() -> None:
    block, group = get_format("fp8_w8a8_block"), get_format("int4_w4a16_group_128")
    assert block.misfits(2048, 768) == group.misfits(2048, 768) == ()
    assert ["192" in sentence and "128" in sentence for sentence in block.misfits(2048, 192)] == [True]
    assert "hidden_size of a rank is 2880" in block.misfits(2880, 256)[0]
    assert block.misfits(2880, 192) and group.misfits(2048, 1408 // 4)
    assert get_format("fp8_w8a8_channel").misfits(511, 1) == PLAIN.misfits(511, 1) == ()


def test_a_shape_carries_its_format() -> None:
    plain = MoEShape("any", 8, 2, 256, 128)
    quantised = MoEShape("any", 8, 2, 256, 128, format=get_format("int4_w4a16_group_32_zp"))
    assert plain.format is PLAIN and hash(plain) != hash(quantised) and plain != quantised
    assert "format" not in plain.to_json(), "recordings and journals of plain weights keep their keys"
    assert quantised.to_json()["format"] == "int4_w4a16_group_32_zp"
    for shape in (plain, quantised):
        assert MoEShape.from_json(shape.to_json()) == shape
    assert quantised.shard(2).format == quantised.format
    assert MoEShape.from_sizes(
        num_experts=8, top_k=2, hidden_size=64, moe_intermediate_size=32, format="fp8_w8a8_channel"
    )


def test_what_takes_plain_weights_alone_says_so() -> None:
    require_plain(load_model("mixtral-8x7b"), "The test")
    with pytest.raises(
        FormatError, match=r"The test takes plain weights.*mixtral-8x7b-awq.*int4_w4a16_group_128_zp.*Marlin"
    ):
        require_plain(load_model("mixtral-8x7b-awq"), "The test")
