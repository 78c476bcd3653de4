"""`moelab tune --kernel fast`: which form of the fastest layer serves each batch size, by measuring, and the file that says so.

At each batch size a race of the forms that are likely (`form_race`), the predicted one and the file's own among them. What is
tied with the fastest stays: the file's, then the predicted. The file is written after each batch size, so that a run that is
stopped loses one at most.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import runtime, writing
from moelab.config_files.form_entries import KERNEL, FormEntry, Layers, form_text, read_form_file
from moelab.config_files.names import file_name
from moelab.errors import ConfigFileError, FormatError, MoelabError
from moelab.formats import PLAIN
from moelab.kernels.checks import current_target
from moelab.kernels.fast_instances import Instance
from moelab.measure import Measurement, tie
from moelab.pipelines import fast
from moelab.pipelines.form_choice import Choice, Form
from moelab.pipelines.form_files import entry_of, form_of, label, layer_of, tuned_form
from moelab.shapes import MoEShape
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.tuner.ahead import compile_all
from moelab.tuner.form_race import Raced, jobs_of, likely, race, refused
from moelab.tuner.problem import BATCH_SIZES
from moelab.tuner.results import Gain, gain_between

ROUNDS = 15
"""Samples of a finalist."""

COMPILING = 0.5
"""Of a budget, after which what is not compiled is left to its first launch."""


@dataclass(frozen=True)
class TunedForm:
    """What became of a batch size. form: that serves it from now on. over: "predicted" and "current" -> how many times faster it
    is. rel_error: of its result beside float64. error: why there is none, then nothing else."""

    num_tokens: int
    form: Form | None = None
    us: Measurement | None = None
    over: Mapping[str, Gain] | None = None
    rel_error: float | None = None
    tried: int = 0
    wrong: tuple[str, ...] = ()
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """Flat, for tables and JSON."""
        if self.form is None or self.us is None:
            return {"num_tokens": self.num_tokens, "form": None, "error": self.error}
        low, high = self.us.interval_us
        found: dict[str, Any] = {"num_tokens": self.num_tokens, "form": label(self.form), "error": None}
        found |= {"layer_us": self.us.median_us, "low_us": low, "high_us": high, "samples_us": list(self.us.samples_us)}
        found |= {"rel_error": self.rel_error, "tried": self.tried, "wrong": list(self.wrong)}
        for name, gain in (self.over or {}).items():
            found |= {f"over_{name}": gain.factor, f"over_{name}_low": gain.low, f"over_{name}_high": gain.high}
        return found


def require_tunable(shape: MoEShape) -> None:
    """Raise FormatError for weights whose forms have no files, and what `fast` raises for a layer that it does not take here,
    RuntimeModeError without a GPU among it."""
    if not shape.format.is_plain:
        raise FormatError(
            f"{shape.name} is in {shape.format.name}. Expected plain weights: over codes `fast` chooses by the rows of an expert "
            "alone. Pass --dtype bfloat16 for the same sizes, or tune its Triton kernel by leaving --kernel out."
        )
    runtime.require_cuda("tuning the forms of 'fast'")
    fast.choose_for(shape, 1, current_target())


def form_path(shape: MoEShape, out: str | Path, device: str, triton_version: str) -> Path:
    """Where the file of a layer lies below `out`."""
    name = file_name(
        shape.num_experts, shape.moe_intermediate_size, device, PLAIN.dtype_selector(shape.dtype), kernel=KERNEL, rules="moelab"
    )  # fmt: skip
    return Path(out) / runtime.triton_key(triton_version) / name


def tune_forms(
    shape: MoEShape,
    out: str | Path,
    batch_sizes: Sequence[int] | None = None,
    *,
    routing: str = "uniform",
    seed: int = 0,
    budget_s: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[TunedForm], Path]:
    """Measure, and write the file below `out`, after each batch size; what became of each, and the file.

    budget_s: after which no batch size is begun. Batch sizes of the file that are not measured stay, and so do other layers.
    Raises what `require_tunable` does, ConfigFileError for a file that cannot be read.
    """
    require_tunable(shape)
    begin, (device, version) = time.perf_counter(), fast.here()
    path = form_path(shape, out, device, version)
    standing = _standing(path, shape)
    sizes = sorted(set(batch_sizes or BATCH_SIZES))
    choices = {m: _predicted(shape, m) for m in sizes}
    forms = {m: [*likely(choice), *_current(standing, m, path)] for m, choice in choices.items()}
    jobs = list(dict.fromkeys(job for found in forms.values() for job in jobs_of(shape, found)))
    instances = list(dict.fromkeys(each for found in forms.values() for each in found if isinstance(each, Instance)))
    until = begin + COMPILING * budget_s if budget_s else float("inf")
    compiled = compile_all(jobs, instances, until=until)
    say(f"{len(compiled)} of {len(jobs)} kernels and {len(instances)} instances compiled after {_since(begin)}")
    weights, done = weight_sets(shape, seed), list[TunedForm]()
    for m in sizes:
        if budget_s and time.perf_counter() - begin > budget_s:
            say(f"the budget of {budget_s:.0f} s is over before {', '.join(map(str, sizes[len(done) :]))} tokens")
            break
        failed = refused(shape, forms[m], compiled)
        try:
            layer = Layer(shape, m, protocol_for(m).rotations, weights, routing)
            current = _current(standing, m, path)
            raced = race(layer, forms[m], failed, [choices[m].form, *current], ROUNDS)
            done.append(_judged(m, raced, choices[m].form, current))
        except MoelabError as error:
            done.append(TunedForm(m, error=f"{type(error).__name__}: {error}"))
        if (form := done[-1].form) is not None:
            _write(path, layer_of(fast.batch_of(shape, m)), m, entry_of(form))
        say(_line(done[-1]))
    say(f"{_since(begin)} in all")
    fast.chosen.cache_clear()  # this process may go on, by the new file
    tuned_form.cache_clear()
    return done, path


def _predicted(shape: MoEShape, num_tokens: int) -> Choice:
    """What would serve without a file of forms."""
    return fast.predicted(
        fast.batch_of(shape, num_tokens), shape.dtype, *fast.here(), os.environ.get("MOELAB_CONFIG_DIR")
    )


def _standing(path: Path, shape: MoEShape) -> dict[int, FormEntry]:
    try:
        layers: Layers = read_form_file(path) if path.exists() else {}
    except ConfigFileError as error:
        raise ConfigFileError(f"{error} To tune into its folder, move it away first, or name another.") from error
    return layers.get(layer_of(fast.batch_of(shape, 1)), {})


def _current(standing: Mapping[int, FormEntry], num_tokens: int, path: Path) -> list[Form]:
    entry = standing.get(num_tokens)
    return [] if entry is None else [form_of(entry, f"{path}, batch size {num_tokens}")]


def _judged(num_tokens: int, raced: Raced, predicted: Form, current: Sequence[Form]) -> TunedForm:
    """The fastest, or what ties with it and was there before."""
    finals, best = raced.finals, raced.best
    kept = [form for form in (*current, predicted) if form in finals and tie(finals[form], finals[best])]
    form = kept[0] if kept else best
    rivals = {"predicted": predicted, **({"current": current[0]} if current else {})}
    over = {
        name: gain_between(name, finals[rival].samples_us, finals[form].samples_us)
        for name, rival in rivals.items()
        if rival in finals
    }
    rel_error = raced.judged[label(form)].get("rel_error")
    return TunedForm(num_tokens, form, finals[form], over, rel_error, len(raced.tried), raced.wrong)


def _write(path: Path, layer: str, num_tokens: int, entry: FormEntry) -> None:
    with writing.locked(path.parent):  # another run may be at other batch sizes, or at another layer of the same name
        layers = read_form_file(path) if path.exists() else {}
        entries = {**layers.get(layer, {}), num_tokens: entry}
        with writing.together({path: form_text({**layers, layer: entries})}):
            pass


def _since(begin: float) -> str:
    seconds = int(time.perf_counter() - begin)
    return f"{seconds // 60}:{seconds % 60:02d}"


def _line(found: TunedForm) -> str:
    if found.form is None or found.us is None:
        return f"{found.num_tokens} tokens: {found.error}"
    return f"{found.num_tokens} tokens: {found.us.median_us:.2f} us by {label(found.form)}"
