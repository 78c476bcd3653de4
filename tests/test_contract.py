"""What `fused_moe` promises at its edges, by every implementation: ids of -1, NaN, scalars, tensors, and its configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moelab import config_files, runtime
from moelab.config import KernelConfig, default_config
from moelab.errors import ConfigError, DtypeError, LayoutError, MoelabError, RoutingError, ShapeError
from moelab.formats import get_format
from moelab.fused_moe import available_implementations, fused_moe
from moelab.implementations import IMPLEMENTATIONS
from moelab.inputs import MoEInputs, make_inputs
from moelab.pipelines.call_configs import call_configs, tuned_configs
from moelab.reference import fused_moe_ref
from moelab.shapes import MoEShape
from moelab.weights import ExpertWeights

E, K, H, N = 4, 2, 32, 16
SHAPE = MoEShape("tiny", num_experts=E, top_k=K, hidden_size=H, moe_intermediate_size=N, dtype="float32")
TILE = KernelConfig(16, 32, 16, 1)
HERE = available_implementations(torch.float32)
ON_GPU = [name for name, one in IMPLEMENTATIONS.items() if one.chips is None or "sm_90" in one.chips]
nan, inf = float("nan"), float("inf")


def inputs(
    dtype: torch.dtype = torch.float32, device: str = "cpu", num_tokens: int = 3, shape: MoEShape = SHAPE
) -> MoEInputs:
    return make_inputs(shape, num_tokens, dtype=dtype, device=device)


def run(i: MoEInputs, impl: str, **more: object) -> torch.Tensor:
    config = TILE if IMPLEMENTATIONS[impl].triton else None
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids, "config": config, **more}
    return fused_moe(i.hidden_states, i.weights, impl=impl, **given)


def with_foreign(i: MoEInputs, ids: list[list[int]]) -> MoEInputs:
    """Those ids, with weights that are no numbers wherever an id is -1."""
    made = torch.tensor(ids, dtype=torch.int32, device=i.topk_ids.device)
    bad = torch.tensor([nan, inf], device=made.device).expand(made.shape)
    return dataclasses.replace(i, topk_ids=made, topk_weights=torch.where(made < 0, bad, i.topk_weights))


def check_foreign(i: MoEInputs, impl: str, on_input: bool) -> None:
    """Like the same call whose foreign weights are 0, and rows that choose nobody are zeros."""
    clean = dataclasses.replace(i, topk_weights=torch.where(i.topk_ids < 0, 0.0, i.topk_weights))
    out, wanted = (run(each, impl, apply_router_weight_on_input=on_input) for each in (i, clean))
    assert not out.isnan().any() and torch.equal(out, wanted)
    assert (out[(i.topk_ids < 0).all(1)] == 0).all() and (out[(i.topk_ids >= 0).any(1)] != 0).any()


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("impl", HERE)
def test_an_id_of_minus_one_adds_nothing_whatever_its_weight(impl: str, on_input: bool) -> None:
    check_foreign(with_foreign(inputs(), [[0, -1], [2, 3], [-1, -1]]), impl, on_input)


@pytest.mark.gpu
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [3, 9, 200])
@pytest.mark.parametrize("impl", ON_GPU)
def test_an_id_of_minus_one_adds_nothing_on_the_gpu(
    impl: str, num_tokens: int, dtype: torch.dtype, on_input: bool
) -> None:
    """At sizes whose batches `fast` serves by a few tokens' launches, and by one launch."""
    shape = dataclasses.replace(SHAPE, num_experts=32, hidden_size=256, moe_intermediate_size=512)
    i = inputs(dtype, "cuda", num_tokens, shape)
    ids = i.topk_ids.clone()
    ids[0, 1] = ids[-1] = -1
    i = with_foreign(i, ids.tolist())
    if IMPLEMENTATIONS[impl].deterministic:
        check_foreign(i, impl, on_input)
    else:
        assert not run(i, impl, apply_router_weight_on_input=on_input).isnan().any()


@pytest.mark.parametrize("impl", HERE)
def test_nan_stays_with_the_tokens_and_experts_that_have_it(impl: str) -> None:
    """Token 1 holds NaN, expert 3's weights are NaN and only token 2 chose it: token 0 is what it was."""
    i = dataclasses.replace(inputs(), topk_ids=torch.tensor([[0, 1], [1, 2], [3, 0]], dtype=torch.int32))
    plain = run(i, impl)
    i.hidden_states[1, 5] = nan
    i.w13[3], i.w2[3] = nan, nan
    out = run(i, impl)
    assert torch.equal(out[0], plain[0])
    assert out[1].isnan().all() and out[2].isnan().all()


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("on_input", [False, True])
def test_one_expert_in_both_slots(impl: str, on_input: bool) -> None:
    """Each slot by itself: with weighted inputs, activation(w h) + activation(w' h) is not activation((w + w') h)."""
    i = dataclasses.replace(inputs(torch.float64), topk_ids=torch.tensor([[1, 1], [2, 2], [0, 3]], dtype=torch.int32))
    wanted = fused_moe_ref(
        i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, apply_router_weight_on_input=on_input
    )
    out = run(
        i, impl, apply_router_weight_on_input=on_input, check_routing=False
    )  # as on a GPU, where ids are not looked at
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", HERE)
def test_ids_past_32_bits_are_no_expert(impl: str) -> None:
    i = inputs()
    ids = i.topk_ids.long()
    ids[0, 0] += 2**32
    with pytest.raises(RoutingError, match="Expert ids span"):
        run(i, impl, topk_ids=ids)
    if impl == "compiled" or IMPLEMENTATIONS[impl].triton:  # as on a GPU, where ids are not looked at
        foreign = torch.where(ids > E, -1, ids)
        out, wanted = (run(i, impl, topk_ids=each, check_routing=False) for each in (ids, foreign))
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", ["hidden_states", "w13", "w2", "topk_weights"])
@pytest.mark.parametrize("impl", HERE)
def test_a_negative_bit_is_no_plain_tensor(impl: str, name: str) -> None:
    i = inputs()
    changed = dataclasses.replace(i, **{name: torch._neg_view(getattr(i, name))})
    with pytest.raises(LayoutError, match=rf"{name} carries torch's negative bit.*resolve_neg"):
        run(changed, impl)


def zeros(hidden: int, inner: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.zeros(3, hidden), "w13": torch.zeros(E, 2 * inner, hidden),
        "w2": torch.zeros(E, hidden, inner),
    }  # fmt: skip


WRONG: list[tuple[dict[str, object], type[MoelabError], str]] = [
    ({"routed_scaling_factor": None}, ConfigError, "routed_scaling_factor is None"),
    ({"routed_scaling_factor": "2"}, ConfigError, "routed_scaling_factor is '2'"),
    ({"routed_scaling_factor": True}, ConfigError, "routed_scaling_factor is True"),
    ({"routed_scaling_factor": 2j}, ConfigError, "routed_scaling_factor is 2j"),
    ({"routed_scaling_factor": 10**400}, ConfigError, "routed_scaling_factor is 1000"),
    ({"hidden_states": None}, DtypeError, "hidden_states is NoneType"),
    ({"hidden_states": [[1.0]]}, DtypeError, "hidden_states is list"),
    ({"w13": np.zeros((E, 2 * N, H), np.float32)}, DtypeError, "w13 is ndarray"),
    ({"w2": None}, DtypeError, "w2 is NoneType"),
    ({"topk_ids": [[0, 1]] * 3}, DtypeError, "topk_ids is list"),
    ({"hidden_states": torch.zeros(3, H).to_sparse()}, LayoutError, "torch.sparse_coo"),
    ({"top_k": True}, RoutingError, "top_k is True"),
    ({"top_k": 2.0}, RoutingError, "top_k is 2.0"),
    ({"config": 16}, ConfigError, "config is 16"),
    ({"config": "defualt"}, ConfigError, "config is 'defualt'"),
    (zeros(0, N), ShapeError, "has shape .*0"),
    (zeros(H, 0), ShapeError, "has shape .*0"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG, ids=[words for *_, words in WRONG])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_is_wrong_is_named(impl: str, change: dict[str, object], error: type[MoelabError], words: str) -> None:
    i = inputs()
    given = {name: getattr(i, name) for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")}
    with pytest.raises(error, match=f"{words}.*Expected"):
        fused_moe(**{**given, **change}, impl=impl)


def test_weights_come_as_one_or_apart_and_not_both() -> None:
    i = inputs()
    routing = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids}
    one = fused_moe(i.hidden_states, ExpertWeights(i.w13, i.w2), impl="torch", **routing)
    assert torch.equal(one, fused_moe(i.hidden_states, i.w13, i.w2, impl="torch", **routing))
    with pytest.raises(ShapeError, match="ExpertWeights came with w2"):
        fused_moe(i.hidden_states, i.weights, i.w2, impl="torch", **routing)
    with pytest.raises(ConfigError, match=r"weights in the format int8_w8a16_channel.*Expected one of those that do"):
        fused_moe(
            i.hidden_states, i.weights._replace(format=get_format("int8_w8a16_channel")), impl="compiled", **routing
        )


@pytest.mark.parametrize("impl", HERE)
def test_an_int_a_float_and_a_numpy_factor_are_one(impl: str) -> None:
    i = inputs()
    first, *others = (run(i, impl, routed_scaling_factor=factor) for factor in (2, 2.0, np.float32(2)))
    if IMPLEMENTATIONS[impl].deterministic:
        assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, 2 * run(i, impl))


# --- which configs a call takes -----------------------------------------------------------------------------------


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Callable[..., None]:
    """Writes a tuned file for SHAPE on this device; `tuned(config, down=..., kernel=...)`."""
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    folder = tmp_path / runtime.triton_key()

    def write(config: KernelConfig, **how: object) -> None:
        name = config_files.file_name(E, N, runtime.current().device_name, dtype_selector="float32", **how)
        config_files.write_config_file(folder / name, {4: config})

    yield write
    from moelab.pipelines import call_configs as module

    module._tuned.cache_clear()


def seen_by(monkeypatch: pytest.MonkeyPatch, impl: str, **how: object) -> tuple[KernelConfig, KernelConfig]:
    """GEMM1's and GEMM2's config of a call of that implementation."""
    seen: list[tuple[KernelConfig, KernelConfig]] = []
    from moelab.pipelines import layers

    def watch(call, kernel=None):
        seen.append(call_configs(call, kernel))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(layers, "call_configs", watch)
        i = inputs()
        fused_moe(i.hidden_states, i.weights, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl=impl, **how)
    return seen[0]


def test_a_call_takes_the_tuned_file(tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    default, up, down = default_config(3, E), KernelConfig(32, 16, 16, 1), KernelConfig(32, 32, 16, 1)
    assert seen_by(monkeypatch, "triton", config="default") == (default, default)
    tuned(up)
    assert seen_by(monkeypatch, "triton") == (up, up)
    assert seen_by(monkeypatch, "triton", config="default") == (default, default)
    assert seen_by(monkeypatch, "triton", config=TILE) == (TILE, TILE)
    from moelab.pipelines import call_configs as module

    module._tuned.cache_clear()
    tuned(down, down=True)
    assert seen_by(monkeypatch, "triton") == (up, down)
    assert seen_by(monkeypatch, "gated") == (default, default)  # another kernel's: none of its own
    tuned(down, kernel="gated")
    module._tuned.cache_clear()
    assert seen_by(monkeypatch, "gated") == (down, down)


def test_files_are_read_once_a_batch_size(tuned) -> None:
    from moelab.pipelines import call_configs as module

    tuned(TILE)
    before = module._tuned.cache_info().misses
    for _ in range(3):
        assert tuned_configs(E, N, "float32", 7)[0] == TILE
    assert module._tuned.cache_info().misses == before + 1


@pytest.mark.gpu
def test_a_call_takes_the_shipped_file_on_an_h200() -> None:
    """Qwen3-30B-A3B's, whose file lies in configs/ for this chip and Triton."""
    up, _ = tuned_configs(128, 768, "bfloat16", 64)
    if runtime.current().device_name != "NVIDIA H200":
        pytest.skip("the shipped files are an H200's")
    assert up != default_config(64, 128)
