"""`moelab tune`: a thin shell around `moelab.tuner.session.TuneSession`, with the flag names of sglang's tuner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelab.cli import asking, form_command, options, printing, resuming
from moelab.cli.progress_bar import Bar, minutes

if TYPE_CHECKING:
    from moelab.tuner.evaluate import Evaluator
    from moelab.tuner.problem import Problem
    from moelab.tuner.results import TuneResult
    from moelab.tuner.session import TuneSession

_OF_THE_MODEL = (
    "tp_size", "ep_size", "dtype", "per_channel_quant", "block_shape", "disable_shared_experts_fusion", "rules"
)  # fmt: skip
_NOT_IN_REPLAY = ("routing", "gpus")
_WITH_RESUME = ("resume", "ray", "gpus", "budget", "out", "freeze", "as_json")


def _given(context: typer.Context) -> dict[str, Any]:
    """Options of the command line that say something else than by default: name -> value."""
    return {
        name: context.params[name]
        for option in context.command.params
        if (name := option.name or "")
        and str(getattr(context.get_parameter_source(name), "name", None)) == "COMMANDLINE"
        and context.params[name] != option.default
    }


def _require_meaning(context: typer.Context) -> None:
    """Refuse options that a replay or a journal would pass over: what they ask for is not what would be run."""
    given = {option.name or "": option.opts[0] for option in context.command.params if option.name in _given(context)}
    if "resume" in given:
        passed_over = [name for name in given if name not in (*_WITH_RESUME, "_tune")]
        source = "the run's journal"
    elif "replay" in given:
        unheard = _NOT_IN_REPLAY if "model" in given else (*_NOT_IN_REPLAY, *_OF_THE_MODEL)
        passed_over = [name for name in given if name in unheard]
        source = "the landscape"
    else:
        return
    if passed_over:
        model = "; or name the --model that they belong to" if set(passed_over) <= set(_OF_THE_MODEL) else ""
        also = model if "replay" in given and "resume" not in given else ""
        raise typer.BadParameter(
            f"{', '.join(given[name] for name in passed_over)} would be passed over: {source} says what is tuned. Expected "
            f"none of them beside {given['resume' if 'resume' in given else 'replay']}. Leave them out{also}."
        )


_Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto: the model's; fp8_w8a8, int8_w8a8, int8_w8a16, int4_w4a16; bfloat16, float16, float32."
    ),
]
_Freeze = Annotated[
    Path | None, typer.Option("--freeze", help="Freeze every measurement into this Parquet file, for replay.")
]
_PerChannel = Annotated[
    bool, typer.Option("--per-channel-quant", help="Of --dtype: a scale for each channel of the weights.")
]
_BlockShape = Annotated[
    tuple[int, int] | None,
    typer.Option("--block-shape", metavar="N K", help="Of --dtype: a scale for each block, 0 G: for each G columns."),
]


_BatchSizes = Annotated[
    list[int] | None,
    typer.Option(
        "--batch-size",
        "--batch-sizes",
        min=1,
        max=options.MOST_TOKENS,
        help="Tokens; repeat. Default: sglang's 18; in replay, the landscape's.",
    ),
]


def tune(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", help="A preset, a Hugging Face id, or a config.json.")] = None,
    tp_size: Annotated[int, typer.Option("--tp-size", "--tp", min=1, help="Ranks that share the layer.")] = 1,
    ep_size: Annotated[int, typer.Option("--ep-size", "--ep", min=1, help="Of them, how many divide the experts.")] = 1,
    dtype: _Dtype = "auto",
    per_channel_quant: _PerChannel = False,
    block_shape: _BlockShape = None,
    batch_size: _BatchSizes = None,
    disable_shared_experts_fusion: Annotated[
        bool, typer.Option("--disable-shared-experts-fusion", help="Leave shared experts out, as sglang's switch does.")
    ] = False,
    rules: Annotated[
        str, typer.Option("--rules", help="Whose server is tuned for: moelab (as sglang), sglang or vllm.")
    ] = "moelab",
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel",
            help="Of fused_moe: triton (as sglang and vLLM run; the default), tma, split_k_workspace, gated, gated_tma; or fast: "
            "which form serves a batch.",
        ),
    ] = None,
    down: Annotated[bool, typer.Option("--down/--no-down", help="A config file of its own for GEMM2.")] = True,
    strategy: Annotated[str, typer.Option("--strategy", help="race, forest, grid or random.")] = "race",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="As 5m: of it 0.6 at most compile, after 0.8 only the finals run; none: no limit."
        ),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            "--routing", help="uniform, zipf, dirichlet, or a file of ids, also FlashInfer-Bench's workloads."
        ),
    ] = "uniform",
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=options.MOST_SEED, help="Of inputs, routings and the search.")
    ] = 0,
    replay: Annotated[
        str | None, typer.Option("--replay", help="Tune against a recorded landscape: its name or path. No GPU.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="The journal of a run to take up again.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster whose GPUs to use.")] = None,
    gpus: Annotated[str, typer.Option("--gpus", help="Of this machine, as 0,1,2; or all.")] = "0",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            file_okay=False,
            help="Folder of journal and config files; default: tuned, none in replay, the run's own with --resume.",
        ),
    ] = None,
    freeze: _Freeze = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    _tune: Annotated[bool, typer.Option("--tune", hidden=True, help="Taken for sglang's sake; does nothing.")] = False,
) -> None:
    """Find a layer's fastest configs, on a GPU or by replay. Writes the files of sglang and vLLM, or a --kernel's own."""
    budget_s = resuming.seconds(budget)
    _require_meaning(context)
    if resume is None and replay is None and model is None:
        raise typer.BadParameter("pass --model M; or --replay LANDSCAPE, or --resume RUN, which name their own.")
    if freeze is not None and replay is not None:
        raise typer.BadParameter("--freeze keeps measurements, and a replay makes none. Expected one of the two.")
    shown = Bar()
    run: Path | None
    asked = {
        "model": model, "tp_size": tp_size, "ep_size": ep_size, "rules": rules, "batch_sizes": batch_size, "routing": routing,
        "dtype": asking.asked_dtype(dtype, per_channel_quant, block_shape), "seed": seed, "separate_down": down,
        "disable_shared_experts_fusion": disable_shared_experts_fusion, "kernel": kernel, "gpus": options.gpus(gpus),
    }  # fmt: skip
    if kernel == "fast":
        if not form_command.tune_fast(asked, _given(context), budget_s, out or Path("tuned"), as_json, shown.line):
            raise typer.Exit(1)
        return
    if resume is not None:
        session, run = _resumed(resume, ray, options.gpus(gpus), budget_s, shown), resume
        out = out or resuming.folder_of(resume)
    else:
        out = out or (None if replay else Path("tuned"))
        session, run = _new(asked, replay, ray, strategy, budget_s, out, shown)
    how = resuming.options(run, out, _given(context)) if run else None
    with resuming.told(shown.line, how and resuming.command(how, session.budget_s)):
        result, files = _run(session, run, out, freeze, shown)
    _report(result, run, how, files, as_json)
    if result.errors:
        raise typer.Exit(1)


def _run(
    session: TuneSession, run: Path | None, out: Path | None, freeze: Path | None, shown: Bar
) -> tuple[TuneResult, list[Path]]:
    """To the end: search, landscape, config files."""
    result = session.run()
    shown.end()
    if freeze is not None and run is not None:
        from moelab.tuner import landscape

        shown.line(f"froze {landscape.freeze(run, freeze)}")
    return result, result.write(out) if out and result.to_configs()["up"] else []


def _new(
    asked: Mapping[str, Any],
    replay: str | None,
    ray: str | None,
    strategy: str,
    budget_s: float | None,
    out: Path | None,
    shown: Bar,
) -> tuple[TuneSession, Path | None]:
    from moelab.tuner.landscape import default_name
    from moelab.tuner.results import standing
    from moelab.tuner.runs import new_label
    from moelab.tuner.session import TuneSession

    label = new_label(strategy)
    if replay:
        problem, evaluator = _replayed(asked, replay, ray)
    else:
        problem, evaluator = _on_gpu(asked, ray, out and out / "runs" / f"quarantine-{label}")
    if asked["model"] is not None and problem.file_kernel is None:
        for sentence in asking.who_asks(asked, problem):
            shown.line(sentence)
    if out is not None:
        standing(problem, out)  # a file that cannot be read is told now, not after the run
    run = out and out / "runs" / f"{default_name(problem)}-{label}.jsonl"
    session = TuneSession(problem, evaluator, strategy=strategy, run=run, budget_s=budget_s, on_progress=shown.progress)
    return session, run


def _replayed(asked: Mapping[str, Any], replay: str, ray: str | None) -> tuple[Problem, Evaluator]:
    """The landscape's own problem, at the batch sizes asked for; a model or kernel that is named has to be the one recorded."""
    from moelab.tuner.evaluators import load_evaluator
    from moelab.tuner.landscape import load
    from moelab.tuner.starting import replay_of, replay_problem

    landscape = load(replay)
    problem = replay_problem(
        landscape, asked["batch_sizes"], shape=None if asked["model"] is None else asking.tuned_shape(asked),
        seed=asked["seed"], separate_down=asked["separate_down"], kernel=asked["kernel"],
    )  # fmt: skip
    if ray is not None:
        return problem, load_evaluator("ray")(problem, address=ray, landscape=landscape)
    return problem, replay_of(landscape, problem, seed=problem.seed)


def _on_gpu(asked: Mapping[str, Any], ray: str | None, quarantine: Path | None) -> tuple[Problem, Evaluator]:
    from moelab.tuner.evaluators import make_gpu_evaluator
    from moelab.tuner.problem import COMPATIBLE
    from moelab.tuner.starting import gpu_problem

    shape = asking.tuned_shape(asked)
    problem = gpu_problem(
        shape, asked["batch_sizes"], routing=_routing(asked["routing"], shape.num_experts), seed=asked["seed"],
        separate_down=asked["separate_down"], kernel=asked["kernel"] or COMPATIBLE,
    )  # fmt: skip
    return problem, make_gpu_evaluator(problem, ray=ray, gpus=asked["gpus"], quarantine=quarantine)


def _routing(routing: str, num_experts: int) -> str:
    """A routing's name, or the absolute path of a file that holds one. Raises what reading it raises."""
    from moelab.routing import ROUTINGS, load_routing, make_routing

    if routing in ROUTINGS:
        return routing
    if not Path(routing).suffix:
        make_routing(routing, 1, num_experts, 1)
    load_routing(routing, num_experts)
    return str(Path(routing).resolve())


def _resumed(run: Path, ray: str | None, gpus: tuple[int, ...], budget_s: float | None, shown: Bar) -> TuneSession:
    from moelab.tuner.session import TuneSession
    from moelab.tuner.starting import evaluator_of

    return TuneSession.resume(
        run,
        lambda problem: evaluator_of(run, problem, ray=ray, gpus=gpus),
        budget_s=budget_s,
        on_progress=shown.progress,
    )


# --- what is shown ------------------------------------------------------------------------------------------------


def _report(result: TuneResult, run: Path | None, how: str | None, files: list[Path], as_json: bool) -> None:
    if as_json:
        configs = {side: {str(b): c.to_json() for b, c in found.items()} for side, found in result.to_configs().items()}
        printing.print_json(
            {
                "source": result.source, "kernel": result.problem.kernel, "run": str(run) if run else None,
                "files": [str(path) for path in files],
                "search": result.coverage.to_json() if result.coverage else None,
                "spent_s": result.spent_s, "timeline": [list(item) for item in result.timeline],
                "failures": dict(result.failures), "batches": result.rows(), "configs": configs,
            }
        )  # fmt: skip
        return
    own = result.problem.file_kernel
    print(f"{result.source}{f', kernel {own}' if own else ''}\n")
    print(printing.table([_shown_row(row) for row in result.rows()]))
    phases = ", ".join(f"{name} {minutes(seconds)}" for name, seconds in result.timeline)
    print(f"\n{minutes(result.spent_s)} in all: {phases}")
    for sentence in result.coverage.sentences(how) if result.coverage else []:
        print(sentence)
    for path in files:
        print(f"wrote {path}")


def _shown_row(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        "tokens": row["num_tokens"], "GEMM1": row["up"], "GEMM2": row["down"],
        "layer us": row["layer_us"] and f"{row['layer_us']:.2f} ({row['low_us']:.2f} ... {row['high_us']:.2f})",
    }  # fmt: skip
    for label in ("default", "current"):
        if row[f"over_{label}"]:
            low, high = row[f"over_{label}_low"], row[f"over_{label}_high"]
            shown[f"over {label}"] = f"{row[f'over_{label}']:.3f} ({low:.3f} ... {high:.3f})"
        else:
            shown[f"over {label}"] = None
    note = row["error"] or (f"{row['kept']} stays" if row["kept"] else "")
    return shown | {"": note or ("provisional" if row["provisional"] else "")}
