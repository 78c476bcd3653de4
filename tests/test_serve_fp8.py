"""The serving benchmark over a model whose experts are fp8 codes: whose error is the yardstick, what is refused, what is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_fp8 import stand_in
from tiny_serving import DEVICE, a_file, alone, plan
from typer.testing import CliRunner

from moelab import hf
from moelab.cli import app
from moelab.errors import FormatError
from moelab.formats import get_format
from moelab.serving import clock, coded, contenders, judging, model, steps, suite, table

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="this transformers has no fp8 experts")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield from alone()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that every kernel takes."""
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "quantization_config": quantised}
    return a_file(tmp_path_factory.mktemp("fp8"), **sizes)


def test_the_model_has_finite_logits_and_codes_of_experts_alone(config: Path) -> None:
    contenders.known()
    found = model.build(model.read_config(config), DEVICE, torch.float32, seed=1)
    eights = {name.rsplit(".", 1)[1] for name, one in found.named_parameters() if one.element_size() == 1}
    assert eights == {"gate_up_proj", "down_proj"}
    again = model.build(model.read_config(config), DEVICE, torch.float32, seed=1)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8))
               for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True))  # fmt: skip
    block: Any = next(iter(hf.experts_of(found).values()))
    weights = hf.layer_of(block)[0]
    assert weights.w13_scale.min() > 0 and weights.w13.float().std() == pytest.approx(coded.CODES, rel=0.05)
    contenders.use(found, contenders.EXACT)
    with torch.no_grad():
        logits = found(steps.random_ids(found, 2, 16)).logits
    assert logits.isfinite().all() and logits.std() > 1e-3


@pytest.mark.skipif(DEVICE != "cpu", reason="has a GPU, where a graph takes no loop over experts")
def test_a_run_says_who_stands_beside_and_what_transformers_refuses(config: Path) -> None:
    """Where the kernels of its hub are not, as here, transformers' own is a row that says so, and the others run on."""
    found = suite.serve_bench(plan(config, contenders=("grouped_mm", "moelab_torch")))
    rows = {name: [row for row in found.rows if row["impl"] == name] for name in ("grouped_mm", "moelab_torch")}
    why = {row["kind"]: row["refused"].split(":")[0] for row in rows["grouped_mm"]}
    assert why.pop("serving") == "RuntimeModeError" and set(why.values()) == {"ImportError"}
    kinds = {row["kind"] for row in rows["moelab_torch"] if "refused" not in row}
    assert kinds == {"error", "logits", "decode", "experts of decode", "prefill", "experts of prefill", "serving"}
    judged = table.errors(found.rows)
    assert {line["beside"] for line in judged} == {"moelab_torch"}
    assert [line["within_bound"] for line in judged if line["impl"] == "moelab_torch"] == [True, True]
    assert all(1e-4 < line["rel_error"] < 0.05 for line in judged if line["rel_error"])
    assert found.protocol["format"] == "fp8_w8a8_block_128x128" and "experts alone" in found.protocol["in that format"]
    times = table.times(found.rows)
    assert all(line["gain"] is None for line in times), "there is no other to be beside the first that ran"


def test_transformers_own_forward_is_the_yardstick_where_its_kernel_is(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders.known()
    found = model.build(model.read_config(config), "cpu", torch.float32)
    assert contenders.yardstick(found) == "moelab_torch"
    kernels = fp8.FineGrainedFP8(stand_in, None, None)
    monkeypatch.setattr(fp8, "load_finegrained_fp8_kernel", lambda: kernels)
    monkeypatch.setenv("TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR", "1")
    assert contenders.yardstick(found) == "eager"
    rows = judging.judged(found, ("moelab_torch",), "eager")
    assert [(row["within_bound"], "beside" in row) for row in rows] == [(True, False)] * 2


def test_the_command_says_what_is_in_fp8(config: Path) -> None:
    asked = ["--experts", "moelab_torch", "--prefill", "1x4", "--decode", "1", "--context", "3", "--requests", "0"]
    if DEVICE != "cpu":
        pytest.skip("has a GPU, where a graph takes no loop over experts")
    result = CliRunner().invoke(app, ["serve-bench", "--model", str(config), "--dtype", "float32", *asked])
    assert result.exit_code == 0, result.output
    assert "format: fp8_w8a8_block_128x128; in that format: the experts alone" in result.output


def test_experts_that_transformers_has_not_in_fp8_are_named() -> None:
    """gpt-oss has biases, which FP8Experts takes none of."""
    sizes = {
        "num_local_experts": 4,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 32,
    }
    with torch.device("meta"):
        oss = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gpt_oss", **sizes))
    with pytest.raises(FormatError, match="no FP8Experts of GptOssForCausalLM's"):
        coded.with_codes(oss, get_format("fp8_w8a8_block_16x16"))


@pytest.mark.skipif(DEVICE != "cpu", reason="has a GPU, where a graph takes no loop over experts")
def test_a_wrong_one_is_past_its_bound(config: Path) -> None:
    def wrong(block: Any, *given: Any) -> Any:
        return 1.1 * contenders._exact(block, *given)

    hf.register_function("wrong", wrong)
    rows = suite.serve_bench(plan(config, contenders=("wrong",), prefills=(), decodes=(), load=None)).rows
    assert [row["within_bound"] for row in rows if row["kind"] == "error"] == [False]


@pytest.mark.gpu
def test_kernels_over_codes_in_captured_and_compiled_decodes(config: Path) -> None:
    """Within their bounds, and a graph's tokens, and a compiled step's, are the eager step's."""
    names = ("moelab_triton", "moelab_fast", "moelab", contenders.DEFAULT_RULE)
    rows = suite.serve_bench(plan(config, dtype="bfloat16", contenders=names)).rows
    assert all(row["within_bound"] for row in rows if row["kind"] in ("error", "logits"))
    for name in names:
        assert any("samples_us" in row for row in rows if (row["kind"], row["impl"]) == ("decode", name)), name
    made = model.build(model.read_config(config), DEVICE, torch.bfloat16)
    contenders.use(made, "moelab_triton")
    work = steps.decode(made, 2, 6)
    for name in ("moelab_triton", "moelab_fast"):
        ready = clock._prepared(made, work, name, graph=True)
        work.rewind()
        expected = [(held := work.run()).clone() for _ in range(3)]
        work.rewind()
        for token in expected:
            ready.graph.replay()
            assert torch.equal(held, token)
        ids = steps.random_ids(made, 2, 5)
        with torch.no_grad():
            own = made(input_ids=ids).logits
            compiled = torch.compile(made.forward, fullgraph=True, backend="eager")(input_ids=ids).logits
        assert torch.equal(compiled, own)
        torch.compiler.reset()
