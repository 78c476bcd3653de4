"""The answer of each notebook in three lines, computed from recordings where it is a number: the cell "In short"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab import recordings, roofline
from moelab.plots import (
    fast_forms,
    fast_layer,
    host_time,
    layer,
    quantised_times,
    rivals,
    split_k,
    tma_overhead,
    transfer,
    tuner_regret,
    your_kernel,
)
from moelab.plots import quantised as formats
from moelab.plots import roofline as floors
from moelab.plots import serving as steps
from moelab.plots.cells import names_of
from moelab.plots.panel import Panel, Row, geometric_mean, timing
from moelab.roofline import Ceilings, load_ceilings
from moelab.shapes import MoEShape
from moelab.tuner.problem import GEMMS
from moelab.tuner.survey import Survey, cover
from moelab.tuner.transfer import Transfer


def _lines(**said: str) -> Panel:
    """A question in bold, its answer behind it, three times."""
    return Panel(
        None, [], "\n".join(f"- **{question.replace('_', ' ')}?** {answer}" for question, answer in said.items())
    )


def _at(recording: recordings.Recording) -> Ceilings:
    return load_ceilings(str(recording.provenance["gpu"]), "floors")


def _contest() -> tuple[dict[str, dict[int, float]], str]:
    """Contender -> batch size -> times the floor, the nearest first; and what was compared."""
    one = recordings.load("fast_layer")
    rows = rivals.rows_of(one, _at(one), fast_layer.load_rivals())
    shapes, compared = rivals.shared(rows)
    means = {who: rivals.means_of(compared, who) for who in rivals.LOOKS}
    fast = means[rivals.FAST]
    return means, f"{len(shapes)} layers in bf16 on an {one.provenance['gpu']}, batch {min(fast)} to {max(fast)}"


def bounds(shapes: Mapping[str, MoEShape], at: Ceilings, batches: Sequence[int] = floors.BATCHES) -> str:
    """Which side sets the floor, up to which batch size."""
    turn = {name: next((b for b in batches if roofline.floor_us(roofline.layer_cost(shape, b), at).side == "compute"), None)
            for name, shape in shapes.items()}  # fmt: skip
    known = {name: b for name, b in turn.items() if b}
    first, last = (of(known, key=lambda name: known[name]) for of in (min, max))
    never = [name for name, b in turn.items() if not b]
    rest = f", never by {batches[-1]} for {', '.join(never)}" if never else ""
    first_b, last_b = known[first], known[last]
    turns = f"from batch {first_b} ({first})" + (f" to {last_b} ({last}) on" if first != last else " on")
    return f"Memory, the experts’ weights, up to batch {batches[batches.index(first_b) - 1]}; arithmetic {turns}{rest}."


def _closeness() -> str:
    means, what = _contest()
    over = {who: geometric_mean([*of.values()]) for who, of in means.items()}
    each = ", ".join(f"{who} {over[who]:.2f}" for who in sorted(over, key=over.__getitem__))
    return f"Times the least possible (mean of {what}): {each}."


def welcome(shape: MoEShape, at: Ceilings) -> Panel:
    """00."""
    return _lines(
        What_is_it="A layer that sends each token to a few of many small MLPs, its experts, and adds their results up by weight; "
        "fused: a handful of launches for all experts, no loop over them.",
        What_bounds_it=bounds({shape.name: shape}, at) + " [01_roofline](01_roofline.ipynb)",
        How_fast_is_it=_closeness() + " *fast* is this package’s fastest layer.",
    )


def roof(shapes: Mapping[str, MoEShape], at: Ceilings) -> Panel:
    """01."""
    fast = _contest()[0][rivals.FAST]
    most, least, first = max(fast, key=fast.__getitem__), min(fast, key=fast.__getitem__), min(fast)
    return _lines(
        What_bounds_a_layer=bounds(shapes, at),
        How_close_do_layers_come=_closeness(),
        What_is_left_to_win=f"Of fast at batch {most} a factor of {fast[most]:.2f}, at batch {first} {fast[first]:.2f}; at "
        f"{least} {fast[least]:.2f}. Why: [01a_fast_layer](01a_fast_layer.ipynb).",
    )


def fast(table: Sequence[Row], ideas: Sequence[Row], counted: recordings.Recording) -> Panel:
    """01a. table: of fast_forms.instances; ideas: of fast_ideas.ablation."""
    judged = [row for row in table if row["routing"] == "uniform" and row[fast_forms.LOSS] is not None]
    near = sum(row["tie"] or row[fast_forms.LOSS] <= 100 * fast_layer.LEVEL for row in judged)
    worth = {row["without"]: max(float(v) for k, v in row.items() if k.isdigit() and v) for row in ideas}
    best = sorted(worth, key=lambda idea: -worth[idea])[:3]
    whole = counted.select(launch="whole")
    busy = [
        f"{row['shape']} at {row['num_tokens']} tokens {max(row['tensor_percent'], row['memory_percent']):.0f} %"
        for row in whole
    ]
    return _lines(
        Which_form_serves=f"A rule on tokens and rows an expert chooses; it is within {100 * fast_layer.LEVEL:g} % of the "
        f"fastest, or a tie, in {near} of {len(judged)} cells.",
        Which_ideas_pay=f"At best: {'; '.join(f'{idea} {worth[idea]:.2f} times' for idea in best)}.",
        What_is_left="Busier of tensor cores and memory, of its peak at the launch’s clock: " + ", ".join(busy) + ".",
    )


def accuracy(recorded: Sequence[Row], speed: recordings.Recording) -> Panel:
    """02. recorded: rows of the recording sum_reduce_precision; speed: the recording sum_reduce."""

    def fails(verdict: str) -> str:
        return ", ".join(f"{row['impl']} in {row['dtype']}" for row in recorded if not row[verdict]) or "nothing"

    cells = layer.cells_of(speed.select(dtype="bfloat16"), "num_tokens", "top_k", "hidden").values()
    both = [
        [timing(cell[name]).median_us for name in ("triton", "triton_f32")] for cell in cells if "triton_f32" in cell
    ]
    ratio = geometric_mean([ours / theirs for ours, theirs in both])
    return _lines(
        Who_is_wrong=f"Against float64, allowed twice torch’s own error: {fails('passes')}, whose accumulator is float32.",
        Why_not_a_fixed_tolerance=f"It fails {fails('upstream_passes')}, and its size fits no two dtypes.",
        What_does_precision_cost=f"Nothing: in bfloat16 our Triton sum takes {ratio:.2f} times upstream’s time (geometric mean "
        f"of {len(both)} sizes).",
    )


def splitting(recorded: recordings.Recording, shapes: Mapping[str, MoEShape], sms: int) -> Panel:
    """03."""
    rows = split_k.tiled(recorded, shapes, sms)
    steady = split_k.error_and_spread(recorded).table
    same = [
        kind
        for kind in split_k.KINDS
        if all(row["all runs equal"] == row["cells"] for row in steady if row["kind"] == kind)
    ]
    return _lines(
        When_to_use_it=f"Where a GEMM has fewer tiles than the GPU has SMs: {split_k.of_all(rows, True)}.",
        When_not=f"Where it has more: {split_k.of_all(rows, False)}.",
        Which_kind=f"{', '.join(same)}: the same bits in every run. Atomics differ from run to run, and straight into the "
        "output’s dtype they pass the error bound.",
    )


def host(recorded: recordings.Recording, layers: recordings.Recording, shape: str, peers: Mapping[str, Any]) -> Panel:
    """04."""
    ways = tma_overhead.times(recorded, "launch")
    classic, *others = host_time.lanes(recorded, layers, shape, peers)
    eager: dict[int, list[float]] = {b: [] for b in sorted(names_of(layers.rows, "num_tokens"))}
    for row in layer.timed(layers):
        if row["impl"] == "triton":
            eager[row["num_tokens"]].append(
                timing({"samples_us": row["eager_samples_us"]}).median_us / timing(row).median_us
            )
    hidden = next((b for b, of in eager.items() if of and geometric_mean(of) <= 1 + layer.CLEARLY), None)
    made, kept, none = (ways[way].median_us for way in (tma_overhead.REBUILT, tma_overhead.KEPT, tma_overhead.PLAIN))
    return _lines(
        What_does_a_launch_cost=f"{none:.1f} µs of the host; a TMA descriptor among its arguments {kept - none:.1f} more, one "
        f"made anew on each call {made - kept:.1f} more.",
        Does_the_GPU_wait=f"At one token, launched eagerly, {classic.waits_us:.0f} µs of every {classic.period_us:.0f}; with "
        f"sglang’s launcher {others[-1].waits_us:.0f} of {others[-1].period_us:.0f}.",
        What_to_do=f"Record a CUDA graph: in it the host drops out. Eagerly it is hidden from batch {hidden} on, within "
        f"{layer.CLEARLY:.0%} on average.",
    )


def differences(rules: Sequence[Row]) -> str:
    """In how many of the rules each two loaders differ. rules: moelab.config_files.rules_table(), in whose every rule some
    two of the three do."""
    names = {"moelab": "moelab", "sglang": "sglang", "vllm": "vLLM"}
    pairs = [("sglang", "vllm"), ("moelab", "sglang"), ("moelab", "vllm")]
    each = [(f"{names[a]} and {names[b]}", sum(row[a] != row[b] for row in rules)) for a, b in pairs]
    (who, count), *others = each
    said = ", ".join([f"{who} differ in {count}", *(f"{who} in {count}" for who, count in others)])
    return f"Of the {len(rules)} rules listed below {said}."


def health(rules: Sequence[Row], home: Transfer) -> Panel:
    """06. rules: moelab.config_files.rules_table()."""
    losses = {name: [loss.percent for loss in row.values() if loss] for name, row in home.choices("both").items()}
    default, nearest = (
        (transfer.mean_loss(of), max(of)) for of in (losses["sglang’s default"], losses["the nearest other key"])
    )
    return _lines(
        Which_file_is_read="`moelab explain --model M --batch-size N --rules sglang` says it, step by step. "
        f"{differences(rules)}",
        Is_a_folder_sound="`moelab doctor DIR` names files that no lookup reaches and configs that no kernel takes.",
        What_does_the_wrong_one_cost=f"No file at all: {default[0]:.0f} % on average, {default[1]:.0f} % at worst. A neighbour’s "
        f"batch size: {nearest[0]:.1f} % and {nearest[1]:.0f} %.",
    )


def _is_plain(row: Row) -> bool:
    """Whether a summary of tuned_gain is of a layer in plain weights, as those are that name no format."""
    return row.get("format", "plain") == "plain"


def search(survey: Survey, replayed: recordings.Recording, gained: recordings.Recording) -> Panel:
    """05."""
    few = {gemm: len(cover(survey, gemm, 0.02).chosen) for gemm in GEMMS}
    sizes = len(survey.batch_sizes)
    rows = [row for row in gained.select(kind="summary", over="default") if row.get("geometric_mean")]
    gains = ", ".join(f"{row['geometric_mean']:.2f} ({row['target']})" for row in rows if _is_plain(row))
    if coded := [row for row in rows if not _is_plain(row)]:
        gains += "; of quantised layers " + ", ".join(f"{row['geometric_mean']:.2f} ({row['target']})" for row in coded)
    return _lines(
        Which_config_is_fastest=f"No single one, but few: within 2 % of the best, {few['up']} configs of GEMM1 and "
        f"{few['down']} of GEMM2 serve all {sizes} batch sizes of {survey.problem.shape.name} on an {survey.problem.device}.",
        How_is_it_found=tuner_regret.advice(replayed),
        What_does_it_gain=f"sglang’s default configs take so many times as long: {gains}. *Tune*, below, ends in the file that a "
        "server reads.",
    )


def own_kernel(name: str, table: Sequence[Row]) -> Panel:
    """07. table: of your_kernel.on_the_roof."""
    near = max((row["batch"] for row in table if row["times the least"] <= 1.1), default=0)
    first = table[0]
    ours = min((us, key) for key, us in first.items() if key.endswith(", µs") and not key.startswith("floor") and us)
    left = {row["batch"]: row["fast / floor"] for row in table if "fast / floor" in row}
    return _lines(
        What_does_it_take="One file of kernels, in Triton or CUDA C++, and one entry in a table; after that every check, "
        "figure and timing here is the one that judges ours.",
        Is_it_right="Checked against float64, allowed twice torch’s error; two wrong copies of it are caught below, one of which "
        "a fixed tolerance lets through.",
        How_fast_can_it_be=f"`{name}` asks memory for no more than a tenth over the least up to batch {near}; to beat there: "
        f"{ours[1].removesuffix(', µs')}, {ours[0]:.1f} µs at batch {first['batch']} (floor {first['floor, µs']:.1f})."
        + your_kernel.left_to_win(left),
    )


def quantised(floors_of: Panel, errors_of: Panel, shipped_of: Panel, times_of: Panel) -> Panel:
    """08, from its own figures."""
    return _lines(
        What_does_a_format_gain=formats.in_short_floor(floors_of),
        How_near_to_its_floor_does_a_layer_come=quantised_times.in_short(times_of),
        What_does_it_cost=formats.in_short_error(errors_of),
        Do_the_shipped_configs_serve=formats.in_short_files(shipped_of),
    )


def real_model(measured: steps.Measured) -> Panel:
    """09."""
    return _lines(**steps.in_short(measured))
