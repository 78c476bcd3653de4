"""What the chip's counters say of the one-launch layer: its traffic, its tensor units, its threads.

NVIDIA's Nsight Compute (`ncu`) reads them: it runs this module, which launches the layer whole and then each part alone, and
replays every launch with cold caches. It sets a launch apart from its neighbours, so its times are not those of a recording.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from moelab import runtime
from moelab.errors import RecordingError, RuntimeModeError
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM
from moelab.recordings import Recording
from moelab.suites import fast_layer as suite
from moelab.suites.layer_classic import Layer, weight_sets
from moelab.suites.partial import OnRows, ignore

CELLS = (("mixtral-8x7b/tp2", 8192), ("qwen3-30b-a3b/tp1", 8192), ("qwen3-30b-a3b/tp1", 64), ("deepseek-v3/tp8", 8192))
"""Shape and tokens: large batches of a few wide experts and of many narrow ones, a batch that is limited by memory, and a
short inner size."""

PERCENT = "avg.pct_of_peak_sustained_elapsed"
METRICS: Mapping[str, tuple[str, ...]] = {
    "duration_ns": ("gpu__time_duration.sum",),
    "clocks": ("sm__cycles_elapsed.max",),
    "memory_bytes": ("dram__bytes.sum",),
    "memory_percent": (f"dram__throughput.{PERCENT}",),
    "l2_bytes": ("lts__t_bytes.sum",),
    "l2_percent": (f"lts__throughput.{PERCENT}",),
    "l2_to_processors_bytes": ("l1tex__m_xbar2l1tex_read_bytes.sum",),
    "tensor_percent": (
        f"sm__pipe_tensor_cycles_active.{PERCENT}",
        f"sm__pipe_tensor_op_hmma_cycles_active.{PERCENT}",
        f"sm__inst_executed_pipe_tensor.{PERCENT}",
    ),
    "issue_percent": (f"sm__inst_issued.{PERCENT}",),
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
"""Field of a row -> ncu's metrics for it; the first that the chip has is read. Nanoseconds, clocks and bytes of a launch; per
cent of the peak that the unit could sustain over the same clocks (of L2 and of memory: of their busiest part), of resident warps
per cent of those that an SM holds. ncu may read them in different replays, so clocks by duration is near the chip's
clock, not equal to it."""

PARTS_OF = "l2_percent"
"""The field whose parts are recorded beside it, in `PARTS`: which part of the L2 it is that is busy."""
PARTS = "l2_parts"
"""ncu's name of each such part, without its last word -> per cent of what that part could sustain."""

LAUNCHES = ("whole", "GEMM1", "GEMM2", "the sum")
"""What `launch` profiles, in this order. whole: the launch that serves a batch, without the sums where they have their own."""


def launch(name: str, num_tokens: int) -> None:
    """The layer whole, then its parts alone, in the order of LAUNCHES, each once warm and once between profiler marks.

    By the one-launch instance that is predicted fastest, also where a batch is served by another form: the counters are those of
    the one-launch kernel.
    """
    shape = suite.shape_of(name)
    layer = Layer(shape, num_tokens, 1, weight_sets(shape)[:1])
    instance = suite.instance_of(shape, num_tokens)
    whole = (GEMM1 | GEMM2 if instance.apart else GEMM1 | GEMM2 | SUM,)
    contenders = {"whole": suite.fast(layer, instance, parts=whole, overlap=False), **suite.alone(layer, instance)}
    for label in LAUNCHES:
        contenders[label](0)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        contenders[label](0)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def chosen_metrics(known: Iterable[str]) -> dict[str, str]:
    """Field -> the metric to ask for, of what `ncu --query-metrics` lists; a field that the chip cannot give is left out."""
    bases = {line.split()[0] for line in known if line.strip()}
    found = {}
    for field, names in METRICS.items():
        name = next((each for each in names if each.split(".")[0] in bases or each.startswith("launch__")), None)
        if name is not None:
            found[field] = name
    return found


def rows_of(text: str, metrics: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each launch, in order, from ncu's CSV, without what is no number there. Raises RecordingError for no table."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise RecordingError(
            f"ncu gave no table: {' '.join(lines[-3:])[:300]!r}. Expected its CSV with a column ID. Run `ncu --version`, and see "
            "whether this user may read the counters."
        )
    fields = {metric: field for field, metric in metrics.items()}
    unit, rest = metrics[PARTS_OF].split("__")[0] if PARTS_OF in metrics else None, f".{PERCENT}"
    launches: dict[int, dict[str, Any]] = {}
    for line in csv.DictReader(lines[head:]):
        name, value = line["Metric Name"] or "", re.sub(r"[,\s]", "", line["Metric Value"] or "")
        part = name.split("__")[0] == unit and name.endswith(rest)
        if name not in fields and not part:
            continue
        of = launches.setdefault(int(line["ID"]), {"kernel": line["Kernel Name"]})
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            continue
        if name in fields:
            of[fields[name]] = float(value)
        else:
            of.setdefault(PARTS, {})[name.removesuffix(rest)] = float(value)
    return [launches[number] for number in sorted(launches)]


def profiled(name: str, num_tokens: int, metrics: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each of LAUNCHES. Raises RecordingError where ncu counted anything else."""
    asked = [*metrics.values(), *([f"breakdown:{metrics[PARTS_OF]}"] if PARTS_OF in metrics else [])]
    command = ["ncu", "--csv", "--profile-from-start", "off", "--clock-control", "none", "--print-units", "base"]
    command += ["--kernel-name", "regex:fast_", "--metrics", ",".join(asked)]
    command += [sys.executable, "-m", "moelab.suites.fast_counters", name, str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = rows_of(done.stdout + done.stderr, metrics)
    if len(rows) != len(LAUNCHES):
        raise RecordingError(
            f"ncu counted {len(rows)} launches of {name} with {num_tokens} tokens. Expected {len(LAUNCHES)}: "
            f"{', '.join(LAUNCHES)}. It said: {done.stderr[-200:]!r}. Run `python -m moelab.suites.fast_counters {name} "
            f"{num_tokens}`, and see what it launches."
        )
    common = {"shape": name, "num_tokens": num_tokens, "routing": "uniform"}
    return [{**common, "launch": label, **row} for label, row in zip(LAUNCHES, rows, strict=True)]


def record(cells: Sequence[tuple[str, int]] = CELLS, on_rows: OnRows = ignore) -> Recording:
    """Counters of every launch of every cell. Raises RuntimeModeError without a GPU or without ncu, RecordingError."""
    runtime.require_cuda("the suite 'fast_counters'")
    if shutil.which("ncu") is None:
        raise RuntimeModeError(
            "The suite 'fast_counters' reads the chip's counters with ncu, which is not on PATH. Expected NVIDIA Nsight Compute. "
            "Install it, or name the other suites."
        )
    query = subprocess.run(["ncu", "--query-metrics", "--chip", "gh100"], capture_output=True, text=True)
    metrics = chosen_metrics(query.stdout.splitlines())
    rows: list[dict[str, Any]] = []
    for name, num_tokens in cells:
        rows += profiled(name, num_tokens, metrics)
        on_rows(rows)
    protocol = {
        "tool": "ncu, caches flushed before each replay, clocks left alone",
        "metrics": metrics,
        "launches": "each alone",
    }
    return Recording("fast_counters", runtime.provenance(seed=0), protocol, tuple(rows))


if __name__ == "__main__":
    launch(sys.argv[1], int(sys.argv[2]))
