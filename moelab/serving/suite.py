"""`moelab serve-bench` and `moelab record serve_bench`: which cells are measured, in which order, and what a row says.

The dearest model is made once; cells come in the order of what they tell, so that a run which ends at its limit has the best of
them; all rows so far are handed on after each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch

from moelab import hf, runtime
from moelab.dtypes import dtype_name
from moelab.errors import DtypeError, RecordingError
from moelab.recordings import Recording
from moelab.serving import requests
from moelab.serving.clock import Limit, Protocol, in_turns, rows_of, watched
from moelab.serving.coded import REST, format_of
from moelab.serving.contenders import (
    WITHOUT,
    chosen,
    failures,
    release,
    require_timed,
    told,
    use,
    yardstick,
)  # fmt: skip
from moelab.serving.judging import judged
from moelab.serving.model import build, read_config
from moelab.serving.prediction import experts_of, without_of
from moelab.serving.routes import asked, load_of, require_routing, routed
from moelab.serving.steps import Work, decode, experts, prefill
from moelab.suites.partial import OnRows, ignore

CONTEXT = 256
"""Tokens before a decode step. At a batch of 256 a longer one makes of it mostly transformers' copies of keys and values."""
PREFILLS = ((1, 8192), (1, 512), (1, 2048), (4, 2048))
DECODES = (1, 64, 16, 256, 4)
LAYERS = {"qwen3-30b-a3b": None, "glm-4.5-air": 8, "qwen3-30b-a3b-fp8": 8}
"""What the recording holds: a model whole; of one larger than the memory, and of one with experts in fp8, the first layers."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured of one model. model: as `read_config` takes it. contenders: names of ExpertsInterface, () for those that
    run here. prefills: (batch, length); decodes: batches, each over `context` tokens. eager: decode without a graph too. load: of
    the serving run, if any. limit_s: of all of it, the model's making included.
    """

    model: str | Mapping[str, Any]
    layers: int | None = None
    dtype: str = "bfloat16"
    contenders: tuple[str, ...] = ()
    prefills: tuple[tuple[int, int], ...] = PREFILLS
    decodes: tuple[int, ...] = DECODES
    context: int = CONTEXT
    routing: str = "balanced"
    eager: bool = True
    load: requests.Load | None = field(default_factory=requests.Load)
    limit_s: float = 300.0
    protocol: Protocol = field(default_factory=Protocol)

    @property
    def name(self) -> str:
        """Of the model, as rows say it."""
        return self.model if isinstance(self.model, str) else str(self.model.get("model_type", "a config of one's own"))

    def cells(self) -> list[tuple[str, int, int]]:
        """(kind, batch, length) in their order: a decode, a prefill, and so on; the serving run last."""
        decodes = [("decode", batch, self.context) for batch in self.decodes]
        prefills = [("prefill", batch, length) for batch, length in self.prefills]
        serving = [("serving", self.load.requests, self.load.prompt_tokens)] if self.load else []
        return [cell for pair in zip_longest(decodes, prefills) for cell in pair if cell] + serving


def serve_bench(plan: Plan, on_rows: OnRows = ignore, say: Callable[[str], None] = lambda _: None) -> Recording:
    """Measure one model. Without a GPU nothing is captured in a graph, and kernels that would be interpreted are refused.

    Raises what `read_config` and `build` do, UnknownNameError for a contender or a routing, DtypeError. A contender that fails
    in a cell is a row with `refused`, one that ran out of memory too.
    """
    limit = Limit(plan.limit_s)
    rows: list[Row] = []
    names, device = chosen(plan.contenders), runtime.current().device
    require_routing(plan.routing)
    config = read_config(plan.model, plan.layers)
    with watched(limit):
        model = build(config, device, _dtype(plan.dtype))
        with routed(model, plan.routing, 1):
            pass  # a folder of another model is no outcome of a contender
        say(f"{type(model).__name__} of {config.num_hidden_layers} layers is there; {', '.join(names)} take turns")
        common = {
            "model": plan.name, "layers": config.num_hidden_layers, "moe_layers": len(hf.experts_of(model)),
        }  # fmt: skip
        own = yardstick(model)
        rows += [common | {"batch": 1, "length": row["num_tokens"]} | row for row in judged(model, names, own)]
        on_rows(rows)
        for kind, batch, length in plan.cells():
            if limit.allows(what := f"{kind} {batch}x{length}"):
                say(what)
                try:
                    for row in _cell(model, plan, (names, own), kind, batch, length):
                        rows.append(common | row)
                finally:
                    on_rows(rows)
                release()
    return Recording("serve_bench", _provenance(), _protocol(plan, limit, model), tuple(rows))


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, dtype_name(name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise DtypeError(f"{name!r} is no dtype of weights. Expected bfloat16, float16 or float32. Correct --dtype.")
    return found


def _provenance() -> Row:
    from transformers import __version__

    return runtime.provenance(seed=0) | {"transformers": __version__}


def _protocol(plan: Plan, limit: Limit, model: Any) -> Row:
    graphs, format = runtime.current().mode == "gpu", format_of(model.config)
    in_codes = {} if format is None else {"format": format.name, "in that format": REST}
    return {
        "kind": "one model, contenders in turns by set_experts_implementation", "model": plan.name,
        "decode": "a CUDA graph over a StaticCache" if graphs else "without a graph: there is no GPU",
        "prefill": "wall time of an eager forward to the argmax of its last token; graph: its time in a CUDA graph",
        "experts": "all blocks of experts after one another, asked as in a forward",
        "no experts": "the step, its blocks of experts handing on what they get",
        "weights": "random", **in_codes, "routing": plan.routing, "dtype": plan.dtype,
        "not begun for want of time": limit.skipped,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "load": None if plan.load is None else {k: v if v != float("inf") else "at once" for k, v in asdict(plan.load).items()},
        **asdict(plan.protocol),
    }  # fmt: skip


def _cell(model: Any, plan: Plan, who: tuple[Sequence[str], str], kind: str, batch: int, length: int) -> Iterator[Row]:
    """The rows of one cell. who: the contenders, and who runs what is not timed. What has no room at all, as a cache, is a row
    for each contender."""
    names, own = who
    common: Row = {"kind": kind, "batch": batch, "length": length, "routing": plan.routing}
    most = requests.most_tokens(plan.load) if kind == "serving" and plan.load else batch * length
    refused = None
    try:
        with routed(model, plan.routing, batch if kind == "decode" else most):
            if kind == "serving":
                yield from _serving(model, plan, names, common)
            else:
                yield from _timed(model, plan, names, own, common)
    except failures() as error:
        refused = told(error)
    if refused:
        release()
        yield from ({**common, "impl": name, "refused": refused} for name in names)


def _timed(model: Any, plan: Plan, names: Sequence[str], own: str, common: Row) -> Iterator[Row]:
    graphs, decoding = runtime.current().mode == "gpu", common["kind"] == "decode"
    use(model, own)
    work = (decode if decoding else prefill)(model, common["batch"], common["length"])
    with asked(model) as found:
        work.run()
    told_of = common | {"num_tokens": work.num_tokens, **load_of(model, found)}
    captured = graphs and decoding
    yield from rows_of(in_turns(model, work, names, plan.protocol, graph=captured), told_of | {"graph": captured})
    step = told_of | {"kind": "decode" if decoding else "prefill, graph" if graphs else "prefill", "graph": graphs}
    if graphs and not decoding:
        yield from rows_of(in_turns(model, work, names, plan.protocol, graph=True), step)
    rest = in_turns(model, work, (WITHOUT,), plan.protocol, graph=graphs)
    yield from rows_of(rest, step | {"kind": without_of(step["kind"])})
    if captured and plan.eager:
        yield from rows_of(
            in_turns(model, work, names, plan.protocol), told_of | {"kind": "decode, eager", "graph": False}
        )
    alone: Work = experts(model, found)
    told_of |= {"kind": experts_of(common["kind"]), "graph": graphs}
    yield from rows_of(in_turns(model, alone, names, plan.protocol, graph=graphs), told_of)


def _serving(model: Any, plan: Plan, names: Sequence[str], common: Row) -> Iterator[Row]:
    """A row for each contender and run; the runs of one seed see the same arrivals, and the first of all is thrown away."""
    load = plan.load
    assert load is not None
    told_of = common | {"new_tokens": load.new_tokens}
    for run in range(-1, load.runs):
        for name in names:
            row: Row = {**told_of, "impl": name, "run": run}
            try:
                require_timed(name)
                use(model, name)
                row |= requests.serve(model, load, seed=max(run, 0))
            except failures() as error:
                row["refused"] = told(error)
            if "refused" in row:
                release()
            if run >= 0:
                yield row


SAME = ("gpu", "driver", "torch", "triton", "transformers", "git_commit")
"""What two runs have to share to lie in one recording."""


def require_same(before: Recording) -> None:
    """Raise RecordingError where a run of this process could not be joined to that recording."""
    here = _provenance()
    if other := [name for name in SAME if before.provenance.get(name) != here.get(name)]:
        raise RecordingError(
            f"{before.path or 'The recording'} was made with another {', '.join(other)} "
            f"({', '.join(str(before.provenance.get(name)) for name in other)}). Expected rows of one place and commit in a "
            "file. Name another file, or move that one."
        )


def joined(before: Recording | None, found: Recording) -> Recording:
    """`found` with the rows of `before` that are of other models. Each model's protocol is kept under "models"."""
    if before is None:
        return found
    kept = before.protocol.get("models", {before.protocol["model"]: dict(before.protocol)})
    models = kept | {found.protocol["model"]: found.protocol}
    rows = [row for row in before.rows if row["model"] != found.protocol["model"]]
    return replace(found, protocol={**found.protocol, "models": models}, rows=(*rows, *found.rows))


def record(on_rows: OnRows = ignore) -> Recording:
    """Each model of LAYERS, by a Plan of its own with its limit. Raises RuntimeModeError without a GPU."""
    runtime.require_cuda("the suite 'serve_bench'")
    found: Recording | None = None
    for model, layers in LAYERS.items():
        before: list[Any] = list(found.rows) if found else []
        one = serve_bench(Plan(model, layers), lambda rows, before=before: on_rows([*before, *rows]))  # type: ignore[misc]
        found = joined(found, one)
        release()
    assert found is not None
    return found
