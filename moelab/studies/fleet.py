"""Tune a list of models on every GPU of a machine, in one command that can be cut and begun again: `make tuned`.

Parts, in this order, each a list of runs: "tune" (the race at 19 batch sizes and both GEMMs, config files), "grid" (the
whole grid at six batch sizes), "second" (an independent run of the layers whose landscapes are kept, for judging the
first), "gain" (the study tuned_gain of the new files), "scaling" (the same run on 1 and 2 GPUs, over Ray if it is here). A
run that is complete is skipped, one that was cut goes on where it stood; after every run the config files, the landscape
and the recordings tune_timeline and tuned_gain are on disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moelab import recordings, runtime, writing
from moelab.errors import MoelabError, RuntimeModeError
from moelab.studies import fleet_gain, timeline
from moelab.studies.fleet_job import (
    COMPLETE,
    GRID_AT,
    LARGEST_LANDSCAPE,
    TUNED_AT,
    Done,
    Job,
    Makers,
    gain_over_default,
    journal_of,
    run,
)
from moelab.studies.targets import TARGETS, Target, target_of
from moelab.tuner.landscape import landscapes_dir
from moelab.tuner.progress import Progress

PARTS = ("tune", "grid", "second", "gain", "scaling")

FAILS = (MoelabError, RuntimeError, OSError)
"""What ends one run and not the fleet: moelab's own errors, CUDA's, a full disk."""

SCALED = 1
"""Targets, from the first, whose run is repeated on 1 and on 2 GPUs."""


def jobs(part: str, targets: Sequence[Target], gpus: tuple[int, ...]) -> list[Job]:
    """The runs of a part, by value. Those of "gain" measure layers, in the process of the command, on one GPU."""
    if part == "gain":
        return [Job(part, target) for target in targets]
    if part == "tune":
        return [Job(part, target, batch_sizes=TUNED_AT, gpus=gpus, files=True) for target in targets]
    if part == "grid":
        return [Job(part, t, "grid", batch_sizes=GRID_AT, gpus=gpus) for t in targets if t.grid]
    if part == "second":
        return [Job(part, target, seed=1, batch_sizes=TUNED_AT, gpus=gpus) for target in targets if target.keep]
    if part == "scaling":
        via = "ray" if importlib.util.find_spec("ray") is not None else "gpus"
        counts = [n for n in (1, 2) if n <= len(gpus)]
        return [Job(part, t, batch_sizes=TUNED_AT, gpus=gpus[:n], via=via) for t in targets[:SCALED] for n in counts]
    return []


class Fleet:
    """Runs parts one after another. out: folder of journals (runs/), configs/, landscapes/ and recordings/.

    stop_after_s: seconds after which a part begins nothing new, None for no limit. say: told a line for each event.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        gpus: tuple[int, ...],
        out: Path,
        *,
        stop_after_s: float | None = None,
        makers: Makers | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.targets, self.gpus, self.out = tuple(targets), gpus, out
        self.stop_after_s, self.makers, self.say = stop_after_s, makers or Makers(), say
        self.done: list[Done] = []

    @property
    def timeline(self) -> Path:
        """The recording tune_timeline."""
        return self.out / "recordings" / f"{timeline.SUITE}.json"

    def run(self, parts: Sequence[str]) -> bool:
        """Run the parts; whether everything went well. Ctrl-C passes through, what was cut written into the timeline."""
        for part in parts:
            begin = time.monotonic()
            for job in jobs(part, self.targets, self.gpus):
                if self.stop_after_s is not None and time.monotonic() - begin >= self.stop_after_s:
                    self.done.append(Done(job, "not begun: the part's time is up"))
                    continue
                self._run(job)
        return not any(done.failed for done in self.done)

    def _run(self, job: Job) -> None:
        """One run; its failure is a line of the table, and the next is begun all the same."""
        self.say(f"{job.part}: {job.target.name} on {len(job.gpus)} GPU{'s' * (len(job.gpus) > 1)}")
        begin, path = time.monotonic(), journal_of(job, self.out)
        try:
            self.done.append(self._gain(job) if job.part == "gain" else run(job, self.out, self.makers))
        except KeyboardInterrupt:
            self.done.append(Done(job, "cut", time.monotonic() - begin))
            raise
        except FAILS as error:
            self.done.append(Done(job, f"{type(error).__name__}: {error}", time.monotonic() - begin, failed=True))
        finally:
            if path.is_file() and self.done[-1].status != COMPLETE:
                self._note(path)
        self.say(f"  {self.done[-1].status}, {self.done[-1].seconds:.1f} s")

    def _note(self, path: Path) -> None:
        try:
            timeline.append([path], self.timeline)
        except MoelabError as error:
            self.say(f"  no timeline of it: {error}")

    def _gain(self, job: Job) -> Done:
        begin, path = time.monotonic(), self.out / "recordings" / "tuned_gain.json"
        if not fleet_gain.has_files(job.target, self.out):
            return Done(job, "has no files yet")
        if fleet_gain.is_measured(path, job.target, self.out):
            return Done(job, COMPLETE)
        parts = []
        for row in fleet_gain.measure(path, job.target, self.out):
            mean, slower = row.get("geometric_mean"), row["slower_at"]
            parts.append(f"{row['over']} {mean:.3f}" if mean else f"{row['over']} not compared")
            parts += [f"(slower at {', '.join(map(str, slower))})"] if slower else []
        return Done(job, f"measured, times over tuned: {' '.join(parts)}", time.monotonic() - begin)

    def install(self) -> list[Path]:
        """Copy what belongs into the repository to configs/, data/landscapes and data/recordings; the copies. Timeline
        and gains are added to those there.

        Landscapes of targets without `keep`, and those over LARGEST_LANDSCAPE, stay in `out`.
        """
        copies = []
        for done in self.done:
            for path in done.paths:
                place = self._place(done.job, path)
                if place is not None:
                    copies.append(writing.copy(path, place))
        gain, place = self.out / "recordings" / "tuned_gain.json", recordings.recordings_dir()
        if gain.is_file():
            copies.append(fleet_gain.merge(recordings.load(gain), place / gain.name))
        runs = [path for done in self.done if (path := journal_of(done.job, self.out)).is_file()]
        return [*copies, timeline.append(runs, place / self.timeline.name)] if runs else copies

    def _place(self, job: Job, path: Path) -> Path | None:
        if path.suffix == ".json":
            return runtime.config_dir(to_write=True) / path.parent.name / path.name
        if job.target.keep and path.stat().st_size > LARGEST_LANDSCAPE:
            self.say(f"{path} stays there: {path.stat().st_size} bytes, over the repository's {LARGEST_LANDSCAPE}")
            return None
        return landscapes_dir() / path.name if job.target.keep else None

    def table(self) -> str:
        """A line for each run: what became of it, its seconds, what it gained over the default, its landscape's size."""
        lines = [("part", "target", "GPUs", "seconds", "over default", "landscape kB", "")]
        for done in self.done:
            gain = gain_over_default(done.result) if done.result is not None else None
            size = next((p.stat().st_size / 1000 for p in done.paths if p.suffix == ".parquet"), None)
            lines.append((
                done.job.part, done.job.target.name, str(len(done.job.gpus)), f"{done.seconds:.1f}",
                f"{gain:.3f}" if gain else "", f"{size:.0f}" if size else "", done.status[:110],
            ))  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


# --- the command ----------------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> tuple[Target, ...]:
    """Targets by name ("qwen3-30b-a3b/tp1"), in their own order; all if none is named. Raises UnknownNameError."""
    wanted = {target_of(name) for name in names}
    return tuple(target for target in TARGETS if not wanted or target in wanted)


def seconds_of(text: str) -> float:
    """ "8m", "90s", "1.5h" or seconds. Raises argparse's own error for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time. Expected a number with s, m or h, such as 8m.")
    return float(match[1]) * {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def gpus_of(text: str) -> tuple[int, ...]:
    """ "all" or "0,1"."""
    if text == "all":
        import torch

        return tuple(range(torch.cuda.device_count())) or (0,)
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} names no GPUs. Expected numbers with commas, such as 0,1, or all.")
    return tuple(int(number) for number in text.split(","))


def _require_gpu() -> None:
    here = runtime.current()
    if here.mode != "gpu":
        raise RuntimeModeError(
            f"Tuning measures kernels, and here {here.reason}. Expected a GPU. Run this on a GPU node; without one, `moelab "
            "tune --replay LANDSCAPE` tunes against a recording."
        )


class _Phases:
    """Prints each phase of a run as it begins."""

    def __init__(self) -> None:
        self._last: tuple[Job, str] | None = None

    def show(self, job: Job, now: Progress) -> None:
        """Called with every progress of a run."""
        if self._last != (job, now.phase):
            self._last = (job, now.phase)
            print(f"  {now.spent_s:7.1f} s  {now.phase}", flush=True)


def main(arguments: Sequence[str] | None = None, makers: Makers | None = None) -> int:
    """The command: 0 if all went well, 1 if a run failed, 2 for bad use, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m moelab.studies.fleet", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("targets", nargs="*", help=f"some of {', '.join(t.name for t in TARGETS)}; default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--gpus", type=gpus_of, default="all", help="0,1,2 or all (default)")
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="journals and results (default: tuned)")
    parser.add_argument("--stop-after", type=seconds_of, help="begin nothing new in a part after that, e.g. 8m")
    parser.add_argument("--install", action="store_true", help="copy the results into configs/ and data/")
    given = parser.parse_args(arguments)
    try:
        targets = chosen(given.targets)
        if makers is None:
            _require_gpu()
    except MoelabError as error:
        parser.error(f"{type(error).__name__}: {error}")
    fleet = Fleet(
        targets, given.gpus, given.out, stop_after_s=given.stop_after, makers=makers or Makers(show=_Phases().show),
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    status = 130
    try:
        status = 0 if fleet.run([part for part in PARTS if part in given.parts]) else 1
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {given.out}", flush=True)
    copies = fleet.install() if given.install else []
    print(f"\n{fleet.table()}", *(f"installed {path}" for path in copies), sep="\n", flush=True)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` sends is taken as Ctrl-C
    sys.exit(main())
