"""`moelab export` and `moelab doctor`: configs handed to a loader, and trees of configs looked over; what "fast" chooses."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moelab.cli import options, printing
from moelab.errors import ConfigFileError, MoelabError, counted, nearest_names

if TYPE_CHECKING:
    from moelab.config_files import Exported, Finding, Lookup, Question, Report, Source
    from moelab.shapes import MoEShape

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command()(export)
    app.command()(doctor)


def explain_fast(found: MoEShape, num_tokens: int, device: str, triton_version: str | None, as_json: bool) -> None:
    """What `fused_moe(impl="fast")` runs for a batch, why, and the runners-up with what they are predicted to take. device: whose
    tuned files count; one not known is taken for one that it runs on, and a warning says so. triton_version: None for the one
    installed."""
    from dataclasses import asdict

    from moelab.chips import get_target
    from moelab.pipelines.fast import choose_for
    from moelab.pipelines.form_choice import kind_of, name_of, runners_up
    from moelab.roofline import device_data, device_names

    known = device.replace(" ", "_") in device_names()
    name = device_data(device).get("target") if known else None
    choice = choose_for(found, num_tokens, None if name is None else get_target(name), device, triton_version)
    near = nearest_names(device.replace(" ", "_"), device_names())
    warnings = [] if known else [f"Nothing is known of a device {device!r}: this is what a Hopper GPU would run.{near}"]
    for warning in warnings:
        print(f"moelab: {warning}", file=sys.stderr)
    if as_json:
        form = {"kind": kind_of(choice.form), "name": name_of(choice.form), **asdict(choice.form)}
        every = [
            {"name": name_of(each.form), "even_us": each.even_us, "skewed_us": each.skewed_us}
            for each in choice.predicted
        ]
        said = {"kernel": "fast", "form": form, "reason": choice.reason, "predicted": every, "warnings": warnings}
        printing.print_json(said)
        return
    print(choice.reason)
    if choice.predicted:  # over codes none is
        print(f"{'predicted, us':<44}{'even':>9}{'skewed':>9}")
    for each in runners_up(choice):
        print(
            f"{'* ' if each.form == choice.form else '  '}{name_of(each.form):<42}{each.even_us:>9.1f}{each.skewed_us:>9.1f}"
        )


def kernel_warnings(kernel: str | None, config_dir: Path | None) -> list[str]:
    """A sentence where nobody has a kernel of that name: neither `fused_moe`, nor a reader with config files for it."""
    from moelab.config_files import kernels_with_files
    from moelab.implementations import IMPLEMENTATIONS

    known = list(dict.fromkeys([*IMPLEMENTATIONS, *kernels_with_files(config_dir)]))
    if kernel is None or kernel in known:
        return []
    return [
        f"Nothing here is called {kernel!r}: no implementation of fused_moe, and no config file has kernel={kernel}."
        f"{nearest_names(kernel, known)} Expected one of {', '.join(known)}, or a kernel of your own. What follows is "
        "what the launcher does without a file; correct --kernel if that is not meant."
    ]


def missed(
    asked: Question, answer: Lookup, device: str, version: str, options: str, down: bool, folder: Path | None
) -> dict[str, list[str]]:
    """What a lookup just missed and what to do, as JSON has it. options: of the command that tunes the layer."""
    from moelab.config_files import near

    found = near(asked, answer, device, triton_version=version, options=options, down=down, config_dir=folder)
    return {"near": list(found.misses), "to_do": list(found.todo)}


def tune_options(model: str, tp_size: int, ep_size: int, dtype: str | None, disable_fusion: bool) -> str:
    """The options of `moelab tune` for a layer, as a shell takes them."""
    said = f"--model {shlex.quote(model)} --tp {tp_size}" + (f" --ep {ep_size}" if ep_size > 1 else "")
    return (
        said + (f" --dtype {shlex.quote(dtype)}" if dtype else "") + " --disable-shared-experts-fusion" * disable_fusion
    )


def require_tree(asked: Question, device: str, version: str, down: bool, folder: Path | None) -> None:
    """Raise ConfigFileError where a peer's loader has no folder to search here, with what its package would have."""
    from moelab.config_files import elsewhere, get_rules
    from moelab.config_files.places import folders

    try:
        folders(get_rules(asked.rules), folder)
    except ConfigFileError as error:
        raise ConfigFileError(f"{error}{elsewhere(asked, device, triton_version=version, down=down)}") from None


def print_missed(found: Mapping[str, Sequence[str]]) -> None:
    """Below a lookup: near misses, and what to do."""
    for heading, sentences in (("near", found.get("near", ())), ("to do", found.get("to_do", ()))):
        for number, sentence in enumerate(sentences):
            print(textwrap.fill(
                sentence, 118, initial_indent=f"{'' if number else heading:<7}- ", subsequent_indent=" " * 9,
                break_long_words=False, break_on_hyphens=False,
            ))  # fmt: skip


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", exists=True, help="A config file, or a folder of them or of triton_X_Y_Z."),
    ],
    rules: Annotated[str, typer.Option("--rules", help="Whose loader: moelab, sglang or vllm.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            file_okay=False,
            help="The folder that MOELAB_CONFIG_DIR, SGLANG_MOE_CONFIG_DIR or VLLM_TUNED_CONFIG_FOLDER would name.",
        ),
    ],
    triton_version: Annotated[
        str | None,
        typer.Option(
            "--triton-version",
            callback=options.whole_version,
            help="As 3.6.0; default: what the folder's name or the file says.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    shipped: Annotated[
        Path | None,
        typer.Option(
            "--complete",
            exists=True,
            file_okay=False,
            help="A copy of sglang's package or tree: add its files for layers without files of ours, since the variable "
            "replaces that tree.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write configs as a loader reads them; say how to serve them. Each is found again through that loader's rules; the up
    and the down file of a pair are written both or not at all."""
    from moelab import config_files

    if shipped is not None:
        config_files.own_tree(shipped, rules)  # refused before anything is written
    done: list[Exported] = []
    skipped: dict[str, list[str]] = {}
    pairs: dict[object, list[Source]] = {}
    try:
        for item in config_files.sources(source):
            reason = config_files.left_out(item.name, rules)
            if reason and source.is_dir():  # a single file is refused with an error
                skipped.setdefault(reason, []).append(item.origin.name)
                continue
            if item.lost:
                keys = ", ".join(dict.fromkeys(key for left in item.lost.values() for key in left))
                count = f"{len(item.lost)} of {counted(len(item.configs), 'batch size')}"
                print(f"moelab: left out {keys} at {count} of {item.origin}: it is not written again", file=sys.stderr)
            _doubt(item, rules)
            pair = replace(item.name, down=False), item.triton_version, item.origin.parent
            pairs.setdefault(pair, []).append(item)
        for items in pairs.values():
            done += _export_pair(items, rules, out, triton_version, overwrite)
    except (MoelabError, OSError):
        for written in done:
            print(f"moelab: wrote {written.path} before the error below", file=sys.stderr)
        raise
    for reason, files in skipped.items():
        more = f" and {len(files) - 1} more" * (len(files) > 1)
        print(f"moelab: left out {counted(len(files), 'file')}, {files[0]}{more}: {reason}", file=sys.stderr)
    if not done:
        raise ConfigFileError(
            f"Nothing of {source} could be written for {rules}. Expected a file it asks for. Name another."
        )
    rows = [{"wrote": str(d.path), "batch sizes": len(d.lookups), "found by": d.rules} for d in done]
    printing.show_rows(rows, as_json)
    if shipped is not None:
        added = config_files.complete(out, shipped, rules)
        said = f"added {counted(len(added.written), 'file')} that {rules} ships"
        own = f"; left out {counted(len(added.left_out), 'file')} of layers that have their own here" * bool(
            added.left_out
        )
        print(f"moelab: {said}{own}", file=sys.stderr)
    if not as_json:
        steps = config_files.to_serve(rules, out, [d.path for d in done])
        print(f"\nTo serve {'them' if len(done) > 1 else 'it'}:\n{config_files.as_text(steps)}")


def _doubt(item: Source, rules: str) -> None:
    """Say on stderr what would keep a loader from ever asking for a file, its device or its sizes, or have it ask for others."""
    from moelab import config_files

    for doubt in (
        config_files.device_doubt(item.name.device_name), config_files.not_asked_for(item.name, rules),
        config_files.shared_name(item.name, rules),
    ):  # fmt: skip
        if doubt:
            print(f"moelab: {item.origin.name}: {doubt}", file=sys.stderr)


def _export_pair(
    pair: list[Source], rules: str, out: Path, triton_version: str | None, overwrite: bool
) -> tuple[Exported, ...]:
    from moelab import config_files

    version = triton_version or pair[0].triton_version
    if version is None:
        raise ConfigFileError(
            f"Nothing says under which Triton version {pair[0].origin} was tuned. Expected it in a folder triton_X_Y_Z, or "
            "with a triton_version in it. Pass --triton-version, as in 3.6.0."
        )
    items = [(item.name, item.configs) for item in pair]
    return config_files.export_together(items, rules=rules, out=out, triton_version=version, overwrite=overwrite)


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A tree of configs.")],
    rules: Annotated[str, typer.Option("--rules", help="Whose loader: auto, moelab, sglang or vllm.")] = "auto",
    notes: Annotated[
        bool, typer.Option("--notes", help="Show notes too: nothing to repair, but worth knowing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Config files that no lookup reaches or no kernel takes. Says why; exit status 1 if there are errors."""
    from moelab import config_files

    report = config_files.doctor(folder, rules)
    if as_json:
        printing.print_json(report.to_json())
    else:
        _print_report(report, notes)
    if report.errors:
        raise typer.Exit(1)


def _print_report(report: Report, notes: bool) -> None:
    """Findings under their kind and remedy, then how many of each severity."""
    shown = [finding for finding in report.findings if notes or finding.severity != "note"]
    print(f"{report.rules} reads {report.root}; {counted(len(report.files), 'config file')} below {report.folder}\n")
    for (severity, problem), group in groupby(shown, key=lambda f: (f.severity, f.problem)):
        found = list(group)
        print(f"{severity}: {problem}, {counted(len(found), 'file')}")
        for (reason, remedy), alike in groupby(sorted(found, key=_words), key=_words):
            _print_alike(report, list(alike), reason, remedy)
    from moelab.config_files.findings import SEVERITIES

    hidden = len(report.of("note"))
    counts = ", ".join(counted(len(report.of(severity)), severity) for severity in SEVERITIES)
    print(counts + ("" if notes or not hidden else f" (--notes shows {'it' if hidden == 1 else 'them'})"))


def _words(finding: Finding) -> tuple[str, str]:
    return finding.reason, finding.remedy


def _print_alike(report: Report, findings: Sequence[Finding], reason: str, remedy: str) -> None:
    for finding in findings:
        print(f"  {report.shown(finding.path)}")
    print(f"    why     {reason}\n    remedy  {remedy}\n")
