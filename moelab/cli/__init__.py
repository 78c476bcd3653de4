"""The command line, `moelab shape | explain | bench | ...`. Thin: each command calls a module and prints.

Exit status: 0 done, 1 a problem was found, 2 bad use or something that cannot run here, 130 interrupted. Results go
to stdout, everything else to stderr. Heavy packages (torch, triton) are imported by the commands that need them, so that
`moelab --help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moelab.cli import (
    asking,
    config_commands,
    csv_file,
    options,
    printing,
    record_command,
    serve_command,
    terminal,
    tune_command,
)
from moelab.errors import DeviceError, MoelabError, RuntimeModeError

if TYPE_CHECKING:
    from moelab.config_files import Lookup, Question
    from moelab.shapes import MoEShape

app = typer.Typer(
    name="moelab",
    help="A research workbench for fused Mixture-of-Experts kernels.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

HEAVY = ("ipywidgets", "jupyterlab", "numpy", "pandas", "plotly", "pyarrow", "torch", "triton")
"""What `make cli` leaves out."""

Model = Annotated[str, typer.Option("--model", help="A preset, a Hugging Face id, or the path of a config.json.")]
TpSize = Annotated[int, typer.Option("--tp-size", "--tp", min=1, help="Ranks that share the layer.")]
EpSize = Annotated[int, typer.Option("--ep-size", "--ep", min=1, help="Of them, how many divide the experts.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="bfloat16, float16, float32, float64; default: the model's, quantised or not."),
]
Device = Annotated[str | None, typer.Option("--device", help='"NVIDIA H200"; default: the GPU of this machine.')]
NoFusion = Annotated[
    bool, typer.Option("--disable-shared-experts-fusion", help="Leave shared experts out, as sglang's switch does.")
]
Rules = Annotated[str, typer.Option("--rules", help="Whose server asks: moelab (as sglang), sglang or vllm.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; an error that moelab raises on purpose, or the system, is one
    paragraph."""
    with terminal.plain_streams():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    try:
        options.refuse_empty(argv)
        try:
            app(args=argv, prog_name="moelab")
        finally:
            sys.stdout.flush()  # a full disk is told by an exit status, as all else is
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("moelab: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in HEAVY:
            raise
        print(
            f"moelab: this command needs the package {error.name}, which is not installed here. Expected the whole environment. "
            "Set it up: `make setup`, then .venv/bin/moelab.", file=sys.stderr,
        )  # fmt: skip
        return 2
    except (MoelabError, OSError) as error:
        print(f"moelab: {error if isinstance(error, MoelabError) else printing.refused(error)}", file=sys.stderr)
        return 2
    return 0


def _version(asked: bool) -> None:
    if asked:
        from moelab import __version__

        print(f"moelab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def models(as_json: AsJson = False) -> None:
    """The presets and their sizes. Experts E, top-k, hidden size H and intermediate size N are of the whole model."""
    from moelab.presets import broken_presets
    from moelab.shapes import preset, preset_names

    for name, error in broken_presets().items():
        print(f"moelab: left out {name}: {error}", file=sys.stderr)
    # As the model's config.json has them: what sglang fuses is a matter of serving, and `moelab shape` shows it.
    shapes = [preset(name) for name in preset_names(quantised=True)]
    rows = [
        {
            "preset": s.name, "E": s.num_experts, "k": s.top_k, "H": s.hidden_size, "N": s.moe_intermediate_size,
            "activation": s.activation if s.gated else f"{s.activation}, no gate", "format": s.format.name,
            "architecture": s.architecture,
        }
        for s in shapes
    ]  # fmt: skip
    printing.show_rows(rows, as_json)


@app.command()
def shape(
    model: Model,
    tp_size: TpSize = 1,
    ep_size: EpSize = 1,
    dtype: Dtype = None,
    disable_shared_experts_fusion: NoFusion = False,
    device: Device = None,
    rules: Rules = "moelab",
    as_json: AsJson = False,
) -> None:
    """Sizes on one rank, and the config files that a server asks for. Says where the sizes were read."""
    from moelab import runtime
    from moelab.config_files import ask

    known = device or runtime.gpu_name()
    asked = ask(model, rules, disable_shared_experts_fusion=disable_shared_experts_fusion, device=known,
                tp_size=tp_size, ep_size=ep_size, dtype=dtype)  # fmt: skip
    found, warnings = asked.shape, _doubts(device, asked)
    names = printing.file_names(asked, known or "<device>")
    answer = printing.sizes(found) | {
        "weight_bytes": found.weight_bytes, "keys_used": list(found.keys_used), "rules": asked.rules,
        "because": list(asked.because), "problems": list(asked.misfits), **names, "device": known, "warnings": warnings,
    }  # fmt: skip
    for warning in warnings:
        print(f"moelab: {warning}", file=sys.stderr)
    if as_json:
        printing.print_json(answer)
        return
    answer["weight_bytes"] = f"{answer['weight_bytes']:,} ({answer['weight_bytes'] / 2**30:.2f} GiB a layer)"
    answer = {name: value for name, value in answer.items() if name != "warnings" and (name != "problems" or value)}
    answer["because"] = "; ".join(asked.because)
    answer["device"] = known or "none here: pass --device; <device> stands for it"
    print(printing.listing(answer))


@app.command()
def explain(
    model: Model,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=options.MOST_TOKENS, help="Tokens in the batch.")
    ],
    tp_size: TpSize = 1,
    ep_size: EpSize = 1,
    dtype: Dtype = None,
    disable_shared_experts_fusion: NoFusion = False,
    device: Device = None,
    triton_version: Annotated[
        str | None,
        typer.Option("--triton-version", callback=options.whole_version, help="As 3.6.0; default: the installed one."),
    ] = None,
    rules: Rules = "moelab",
    config_dir: Annotated[
        Path | None,
        typer.Option(
            "--config-dir",
            exists=True,
            file_okay=False,
            help="What the loader's variable would name; default: it does.",
        ),
    ] = None,
    down: Annotated[bool, typer.Option("--down", help="The config of GEMM2.")] = False,
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel", help="One with files of its own, as tma; or fast: what that runs. Default: sglang's and vLLM's."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which config file and batch size a kernel gets, and why. Exit status 1 if the device cannot run that config."""
    from moelab import runtime
    from moelab.config_files import ask

    kernel = None if kernel in ("triton", "grouped_gemm") else kernel
    named, device = device, device or runtime.gpu_name()
    asked = ask(model, rules, disable_shared_experts_fusion=disable_shared_experts_fusion, device=device,
                tp_size=tp_size, ep_size=ep_size, dtype=dtype)  # fmt: skip
    if device is None:
        raise DeviceError(
            "No GPU here whose configs could be looked up. Expected a device's name. Pass --device, for example "
            f"--device 'NVIDIA H200'{_and_triton(triton_version)}."
        )
    if kernel == "fast":
        if config_dir is not None or down or rules != "moelab":
            raise typer.BadParameter(
                "--kernel fast takes no --rules, --config-dir or --down: it says what runs, not by which file."
            )
        return config_commands.explain_fast(asked.shape, batch_size, device, triton_version, as_json)
    version = triton_version or _installed_triton()
    config_commands.require_tree(asked, device, version, down, config_dir)
    answer = asked.lookup(
        device, num_tokens=batch_size, triton_version=version, down=down, config_dir=config_dir, kernel=kernel
    )
    options = config_commands.tune_options(model, tp_size, ep_size, dtype, disable_shared_experts_fusion)
    missed = {} if kernel else config_commands.missed(asked, answer, device, version, options, down, config_dir)
    problems = [*asked.misfits, *_problems(answer, asked, device, kernel)]
    warnings = _doubts(named, asked) + config_commands.kernel_warnings(kernel, config_dir)
    for warning in warnings:
        print(f"moelab: {warning}", file=sys.stderr)
    if as_json:
        printing.print_json(printing.lookup_json(answer, problems, warnings) | printing.question_json(asked) | missed)
    else:
        printing.print_question(asked)
        printing.print_lookup(answer, problems)
        config_commands.print_missed(missed)
    if problems:
        raise typer.Exit(1)


config_commands.register(app)
app.command()(tune_command.tune)


@app.command()
def bench(
    model: Model,
    tp_size: TpSize = 1,
    ep_size: EpSize = 1,
    dtype: Dtype = None,
    disable_shared_experts_fusion: NoFusion = False,
    impl: Annotated[
        list[str] | None, typer.Option("--impl", help="An implementation of fused_moe; repeat. Default: all.")
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, max=options.MOST_TOKENS, help="Tokens; repeat. Default: 1, 16, 256."),
    ] = None,
    routing: Annotated[
        str, typer.Option("--routing", help="How popular experts are: uniform, zipf, dirichlet, or a file of ids.")
    ] = "uniform",
    eager: Annotated[bool, typer.Option(help="Also time calls without a CUDA graph.")] = True,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Also write a row for each implementation and batch size to this new file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """On a GPU: check implementations in float64, then time them.

    Exit status 1 if one is over its error bound, or could not run.
    """
    from moelab.implementations import require_taken

    if csv is not None:
        csv_file.require_new(csv)
    found = _load(model, tp_size, ep_size, dtype, disable_shared_experts_fusion)
    require_taken(found, "moelab bench")
    from moelab.suites import bench as suite

    with _naming_memory(found):
        asked = impl or suite.taking_of(found)
        results = suite.bench(found, batch_size or [1, 16, 256], asked, routing=routing, eager=eager)
    if as_json:
        printing.print_json([printing.bench_json(found, result) for result in results])
    else:
        print(f"floors: {results[0].ceilings}\n")
        for result in results:
            printing.print_bench(found, result)
    if csv is not None:
        csv_file.write(csv, found, results)
        print(f"moelab: wrote {csv}", file=sys.stderr)
    if not all(row["within_bound"] for result in results for row in result.rows):
        raise typer.Exit(1)


app.command()(record_command.record)
app.command("serve-bench")(serve_command.serve_bench)


# --- what the commands share --------------------------------------------------------------------------------------


def _load(model: str, tp_size: int, ep_size: int, dtype: str | None, disable_fusion: bool) -> MoEShape:
    from moelab.shapes import load_model

    return load_model(
        model, tp_size=tp_size, ep_size=ep_size, dtype=dtype, disable_shared_experts_fusion=disable_fusion
    )


def _doubts(device: str | None, asked: Question) -> list[str]:
    """What is doubtful about a device that was named by hand, or about a preset of plain weights."""
    from moelab.config_files import device_doubt

    doubt = device_doubt(device) if device else None
    return [*([doubt] if doubt else []), *asking.published_otherwise(asked.shape)]


def _and_triton(given: str | None) -> str:
    """What else is missing where there is no Triton: said at once, not after a second try."""
    import importlib.util

    return "" if given or importlib.util.find_spec("triton") else ", and --triton-version, the server's, as in 3.6.0"


def _installed_triton() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeModeError(
            "Triton is not installed here. Expected the version whose configs to look for: the server's. Pass it, as in "
            "--triton-version 3.6.0; in the server's environment: python -c 'import triton; print(triton.__version__)'."
        ) from None


def _problems(answer: Lookup, asked: Question, device: str, kernel: str | None) -> list[str]:
    """What the device cannot do with the config; nothing where data/devices does not know the device.

    A kernel beside the compatible kernel is held against what is true of every kernel, as the doctor does.
    """
    from moelab.config import violations
    from moelab.config_files.defaults import device_target
    from moelab.config_files.rules import get_rules
    from moelab.config_files.running import run_violations

    target = device_target(device)
    if answer.config is None or target is None:
        return []
    if kernel is not None:
        return list(violations(answer.config, uses_dot=False))
    if asked.shape.format.is_plain:
        return list(violations(answer.config, dtype=asked.shape.dtype, target=target))
    return list(run_violations(answer.config, asked.name(device), get_rules(asked.rules), target))


@contextlib.contextmanager
def _naming_memory(found: MoEShape) -> Iterator[None]:
    """Turn torch's out-of-memory error into one that names the layer's weights and says what to do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeModeError(
            f"The GPU's memory does not hold weights of {found.weight_bytes:,} bytes and a float64 copy to check "
            "against. Expected a smaller shard. Raise --tp-size, or lower --batch-size."
        ) from error
