"""`moelab tune --kernel fast` on small sizes, with the clock and the Hopper kernels replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moelab import runtime
from moelab.call import MoECall
from moelab.config import KernelConfig
from moelab.config_files.form_entries import form_text, layer_key, read_form_file
from moelab.errors import ConfigFileError, FormatError, RuntimeModeError
from moelab.kernels.fast_instances import INSTANCES, Instance
from moelab.measure import Measurement
from moelab.pipelines import fast, form_choice, form_files
from moelab.pipelines.form_choice import Classic
from moelab.shapes import MoEShape, load_model
from moelab.suites import layer_classic, screening
from moelab.tuner import form_race, form_tuning
from tests.test_fast_suite import few_stand_in, stand_in

SMALL = MoEShape.from_sizes(
    num_experts=4, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float32", ep_size=2, tp_size=2
)
LAYER = layer_key(64, 2, 4)
TILE = KernelConfig(16, 32, 32, 1, 4, 2)


class Clock:
    """Microseconds of a form by its label; of others `rest`. stop: interrupt at the so-manieth finals."""

    def __init__(self, rest: float = 9.0) -> None:
        self.us: dict[str, float] = {}
        self.rest, self.finals, self.stop = rest, 0, 0

    def __call__(self, contenders: dict, protocol: object) -> dict[str, Measurement]:
        self.finals += 1
        if self.finals == self.stop:
            raise KeyboardInterrupt
        return {
            name: Measurement(name, tuple(self.us.get(name, self.rest) + 0.001 * i for i in range(9)))
            for name in contenders
        }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    def without_tma(call: MoECall, tma: bool) -> torch.Tensor:
        return sorted_pipeline(call, False)

    def screened(contenders: dict, protocol: object) -> dict[str, Measurement]:
        forms = list(contenders)
        return {name: Measurement(name, (float(i), float(i))) for i, name in enumerate(forms)}

    sorted_pipeline = fast.sorted_pipeline
    monkeypatch.setattr(fast, "few_tokens", lambda *a, **k: few_stand_in(*a))
    monkeypatch.setattr(fast, "fast_layer", lambda *a, **k: stand_in(*a))
    monkeypatch.setattr(fast, "sorted_pipeline", without_tma)
    monkeypatch.setattr(fast, "_check", lambda call: None)
    monkeypatch.setattr(form_race, "measure", made)
    monkeypatch.setattr(screening, "measure", screened)
    monkeypatch.setattr(layer_classic, "rotations_for", lambda *given, **bounds: 1)
    monkeypatch.setattr(form_tuning, "protocol_for", lambda num_tokens: screening.short_pass(1))
    monkeypatch.setattr(form_tuning, "require_tunable", lambda shape: None)
    monkeypatch.setattr(fast, "here", lambda: ("NVIDIA H200", "3.6.0"))
    monkeypatch.setattr(form_race, "EACH", 1)
    monkeypatch.setattr(form_race, "LIKELY", 1.0)
    monkeypatch.setattr(form_choice, "TILES", {16: (TILE,)})
    fast.chosen.cache_clear()
    form_choice._configs.cache_clear()
    yield made
    fast.chosen.cache_clear()
    form_choice._configs.cache_clear()
    form_files.tuned_form.cache_clear()


def first_of(kind: type, num_tokens: int) -> form_choice.Form:
    return next(
        each.form for each in form_tuning._predicted(SMALL, num_tokens).predicted if isinstance(each.form, kind)
    )


def test_the_fastest_is_written_and_serves(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ids are -1, of the other rank's experts."""
    classic = first_of(Classic, 3)
    clock.us[form_files.label(classic)] = 5.0
    found, path = form_tuning.tune_forms(SMALL, tmp_path, [40, 3])
    assert [each.num_tokens for each in found] == [3, 40] and not any(each.wrong or each.error for each in found)
    assert found[0].form == classic and found[0].over is not None and found[0].rel_error is not None
    assert (
        found[0].over["predicted"].factor == pytest.approx(9.0 / 5.0, rel=0.01) and not found[0].over["predicted"].tie
    )
    assert path.name == "E=2,N=32,device_name=NVIDIA_H200,dtype=float32,kernel=fast.json"
    assert set(read_form_file(path)) == {LAYER} and list(read_form_file(path)[LAYER]) == [3, 40]
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    fast.chosen.cache_clear()
    assert fast.choose_unchecked(SMALL, 3, "NVIDIA H200", "3.6.0").form == classic


def test_what_ties_with_the_fastest_stays(clock: Clock, tmp_path: Path) -> None:
    """The file's own form, and without a file the predicted one."""
    found, path = form_tuning.tune_forms(SMALL, tmp_path, [3])
    predicted = form_tuning._predicted(SMALL, 3).form
    assert found[0].form == predicted and found[0].over is not None and found[0].over["predicted"].factor == 1.0
    classic = first_of(Classic, 3)
    path.write_text(form_text({LAYER: {3: form_files.entry_of(classic)}}))
    again, _ = form_tuning.tune_forms(SMALL, tmp_path, [3])
    assert again[0].form == classic and again[0].over is not None and set(again[0].over) == {"predicted", "current"}


def test_other_batch_sizes_and_layers_stay(clock: Clock, tmp_path: Path) -> None:
    path = form_tuning.form_path(SMALL, tmp_path, "NVIDIA H200", "3.6.0")
    path.parent.mkdir()
    there = {
        LAYER: {512: form_files.entry_of(INSTANCES[48])},
        layer_key(128, 2, 4): {1: form_files.entry_of(INSTANCES[16])},
    }
    path.write_text(form_text(there))
    form_tuning.tune_forms(SMALL, tmp_path, [3])
    layers = read_form_file(path)
    assert list(layers[LAYER]) == [3, 512] and layers[layer_key(128, 2, 4)] == there[layer_key(128, 2, 4)]


def test_a_run_that_is_stopped_keeps_what_it_has(clock: Clock, tmp_path: Path) -> None:
    clock.stop = 2
    with pytest.raises(KeyboardInterrupt):
        form_tuning.tune_forms(SMALL, tmp_path, [1, 3, 40])
    path = form_tuning.form_path(SMALL, tmp_path, "NVIDIA H200", "3.6.0")
    assert list(read_form_file(path)[LAYER]) == [1]


def test_a_budget_ends_before_a_batch_size(clock: Clock, tmp_path: Path) -> None:
    said: list[str] = []
    found, path = form_tuning.tune_forms(SMALL, tmp_path, [1, 3], budget_s=1e-9, say=said.append)
    assert found == [] and not path.exists() and any("1, 3 tokens" in line for line in said)


def test_a_batch_size_without_a_right_form_says_so(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        form_race, "judge", lambda layer, runs: {name: {"within_bound": False, "refused": "wrong"} for name in runs}
    )
    found, path = form_tuning.tune_forms(SMALL, tmp_path, [3])
    assert found[0].form is None and found[0].error and not path.exists()
    assert found[0].row()["error"] == found[0].error


def test_a_broken_file_is_not_written_over(clock: Clock, tmp_path: Path) -> None:
    path = form_tuning.form_path(SMALL, tmp_path, "NVIDIA H200", "3.6.0")
    path.parent.mkdir()
    path.write_text(json.dumps({"forms_version": 7}))
    with pytest.raises(ConfigFileError, match="move it away first"):
        form_tuning.tune_forms(SMALL, tmp_path, [3])


def test_what_has_no_forms_is_refused() -> None:
    with pytest.raises(FormatError, match="plain weights"):
        form_tuning.require_tunable(load_model("qwen3-30b-a3b-fp8"))
    if runtime.current().mode != "gpu":
        with pytest.raises(RuntimeModeError, match="GPU"):
            form_tuning.require_tunable(load_model("qwen3-30b-a3b"))


@pytest.mark.gpu
def test_on_a_gpu_every_batch_size_gets_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelab.kernels.checks import current_target

    target = current_target()
    if target is None or target.name != "sm_90":
        pytest.skip("the forms of 'fast' are for Hopper")
    shape = load_model("qwen3-30b-a3b", tp_size=4, dtype="bfloat16")
    found, path = form_tuning.tune_forms(shape, tmp_path, [2, 96, 3000])
    assert [each.error for each in found] == [None] * 3 and all(each.tried >= 3 for each in found)
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    for each in found:
        assert fast.choose_unchecked(shape, each.num_tokens, *fast.here()).form == each.form
    assert len(read_form_file(path)) == 1


def test_instances_are_tried_where_they_serve(clock: Clock) -> None:
    assert any(isinstance(form, Instance) for form in form_race.likely(form_tuning._predicted(SMALL, 40)))
