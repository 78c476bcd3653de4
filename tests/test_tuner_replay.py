"""Replay and landscapes: what was recorded comes back, with its noise redrawn and its costs charged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from synthetic import small_problem, synthetic_landscape

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import LandscapeError
from moelab.reading import UnreadableError
from moelab.tuner import landscape, landscape_file
from moelab.tuner.evaluate import Outcome, Request, Result
from moelab.tuner.journal import Journal
from moelab.tuner.landscape import Landscape, Row
from moelab.tuner.regret import Point, Truth, trace
from moelab.tuner.replay import ReplayEvaluator, Table
from moelab.tuner.space import build_space

PROBLEM = small_problem()
RECORDED = synthetic_landscape(PROBLEM)
TABLE = Table(RECORDED)
CONFIGS = build_space(PROBLEM).configs


def request(stage: str = "up", b: int = 64, count: int = 8, rounds: int = 5, **more) -> Request:
    sides = ("up", "down") if stage == "layer" else (stage,)
    contenders = tuple(zip(*(CONFIGS[side][:count] for side in sides), strict=True))
    return Request(stage, b, contenders, rounds, **more)


def answer(*requests: Request, seed: int = 0) -> list[Result]:
    return list(ReplayEvaluator(TABLE, PROBLEM, seed=seed).run(requests))


def with_rows(*rows: Row) -> Landscape:
    return dataclasses.replace(RECORDED, rows=rows)


def row(stage: str, contender: tuple, samples: tuple = (), failure: str | None = None, **costs) -> Row:
    return Row(stage, 64, contender, Outcome(samples, failure, "why" if failure else "", **costs), False, "2026")


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_landscape_survives_its_file(tmp_path: Path) -> None:
    path = landscape.write(RECORDED, tmp_path / "synthetic.parquet")
    back = landscape.load(path)
    assert back.problem == PROBLEM and back.provenance == RECORDED.provenance and len(back.rows) == len(RECORDED.rows)
    for mine, its in zip(RECORDED.rows, back.rows, strict=True):
        assert (mine.stage, mine.num_tokens, mine.contender) == (its.stage, its.num_tokens, its.contender)
        assert mine.outcome.failure == its.outcome.failure
        assert np.allclose(mine.outcome.samples_us, its.outcome.samples_us, rtol=1e-6)  # stored as float32
    assert "SYNTHETIC" in back.source()
    frame = back.frame()
    assert len(frame) == len(back.rows) and frame.median_us.notna().any() and set(frame.stage) == {"up", "down"}
    import pyarrow.parquet

    about = json.loads(pyarrow.parquet.read_metadata(path).metadata[b"moelab"])
    assert about["provenance"]["gpu"].startswith("SYNTHETIC") and about["problem"]["device"] == "Synthetic H200"


def test_freezing_a_run(tmp_path: Path) -> None:
    up, down = CONFIGS["up"][0], CONFIGS["down"][0]
    header = {
        "provenance": runtime.provenance(0) | {"gpu": "SYNTHETIC"}, "problem": PROBLEM.to_json(), "strategy": {},
        "space": {}, "evaluator": {"kind": "synthetic", "measured": True},
    }  # fmt: skip
    journal = Journal.create(tmp_path / "run.jsonl", header)
    journal.append(Result(Request("up", 1, ((up,),), 0), (Outcome(compile_s=0.5),)))
    journal.append(Result(Request("up", 64, ((up,),), 2), (Outcome((1.0, 2.0)),)))
    journal.append(Result(Request("layer", 64, ((up, down),), 1), (Outcome((), "timeout", "hung"),)))
    journal.close()
    back = landscape.load(landscape.freeze(tmp_path / "run.jsonl", tmp_path / "a.parquet"))
    assert [r.contender for r in back.rows] == [(up,), (up,), (up, down)]
    assert [r.outcome.failure for r in back.rows] == [None, None, "timeout"] and back.rows[0].outcome.compile_s == 0.5


def test_what_is_listed_is_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    assert landscape.landscape_names() == ()
    landscape.write(RECORDED, landscape.landscapes_dir() / f"{landscape.default_name(PROBLEM)}.parquet")
    (name,) = landscape.landscape_names()
    assert name == "synthetic-small-tp1-Synthetic_H200" and landscape.load(name).name == name


UP = (CONFIGS["up"][0],)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((row("up", UP, (1.0, math.nan)),), "nan"),
        ((row("up", UP, (1.0, 0.0)),), "0.0"),
        ((row("up", UP, (1.0,)), row("up", UP, (math.inf,))), "samples_us.1"),
        ((row("up", UP, (1.0, -1.0)),), "-1.0 at samples_us.0.1"),
        ((row("up", UP, (1.0, 1e30)),), "samples_us.0.1"),
        ((row("up", UP, (1.0,), compile_s=-1.0),), "compile_s.0"),
        ((row("up", UP, (1.0,), measure_s=math.nan),), "measure_s.0"),
        ((row("up", (KernelConfig(17, 32, 64, 1),), (1.0,)),), "17 is not a power of two"),
        ((row("up", UP, (1.0,)), row("up", UP, failure="tired")), "tired"),
        ((row("up", UP, (1.0,), failure="nan"),), "beside samples"),
        ((row("up", UP, ()),), "no measurement"),
        ((row("side", UP, (1.0,)),), "'side'"),
        ((row("layer", UP, (1.0,)),), "1 configs"),
        ((dataclasses.replace(row("up", UP, (1.0,)), num_tokens=65),), "65 tokens"),
    ],
)
def test_an_unsound_landscape_is_not_written(tmp_path: Path, bad: tuple[Row, ...], words: str) -> None:
    with pytest.raises(LandscapeError, match=words):
        landscape.write(with_rows(*bad), tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_nobody_tunes_is_not_written(tmp_path: Path) -> None:
    unknown = dataclasses.replace(RECORDED, problem=dataclasses.replace(PROBLEM, kernel="nope"))
    with pytest.raises(LandscapeError, match=r"'nope' at problem.kernel.*Expected one of"):
        landscape.write(unknown, tmp_path / "a.parquet")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    few = dataclasses.replace(RECORDED, rows=tuple(r for r in RECORDED.rows if r.outcome.samples_us)[:20])
    path = landscape.write(few, tmp_path / "a.parquet")
    data = path.read_bytes()
    import pyarrow.parquet

    pages = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    samples = next(pages.column(i) for i in range(pages.num_columns) if "samples" in pages.column(i).path_in_schema)
    first = samples.dictionary_page_offset or samples.data_page_offset
    path.write_bytes(flipped(data, first + samples.total_compressed_size - 9))
    with pytest.raises(OSError, match=r"CRC|checksum"):  # another reader finds it by Parquet's own
        pyarrow.parquet.read_table(path, page_checksum_verification=True)
    for at in range(0, len(data), 131):
        path.write_bytes(flipped(data, at))
        with pytest.raises(LandscapeError, match=r"is not what was frozen|has no digest"):
            landscape.load(path)


def test_a_landscape_of_an_older_moelab_is_sealed_and_no_other(tmp_path: Path) -> None:
    path = landscape.write(RECORDED, tmp_path / "a.parquet")
    with pytest.raises(UnreadableError, match="without a digest"):
        landscape_file.seal(path)
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    about = json.loads(pyarrow.parquet.read_metadata(path).metadata[b"moelab"])
    del about["digest"]
    pyarrow.parquet.write_table(table.replace_schema_metadata({"moelab": json.dumps(about)}), path)
    with pytest.raises(LandscapeError, match=r"has no digest.*landscape_file FILE"):
        landscape.load(path)
    assert landscape.load(landscape_file.seal(path)).problem == PROBLEM


def test_provenance_is_required(tmp_path: Path) -> None:
    for provenance in ({}, {**RECORDED.provenance, "gpu": None}):
        with pytest.raises(LandscapeError, match="gpu"):
            landscape.write(dataclasses.replace(RECORDED, provenance=provenance), tmp_path / "a.parquet")


# --- replay ----------------------------------------------------------------------------------------------------------


def test_samples_are_redrawn_from_those_recorded() -> None:
    recorded = {r.contender: r.outcome for r in RECORDED.rows if (r.stage, r.num_tokens) == ("up", 64)}
    (result,) = answer(request(rounds=50, count=96))
    for contender, outcome in zip(result.request.contenders, result.outcomes, strict=True):
        assert outcome.failure == recorded[contender].failure if contender in recorded else outcome.failure == "compile"
        if outcome.failure is None:
            assert len(outcome.samples_us) == 50 and set(outcome.samples_us) <= set(recorded[contender].samples_us)
            assert len(set(outcome.samples_us)) > 3


def test_a_draw_depends_on_the_seed_and_the_request_alone() -> None:
    requests = [request(), request("down"), request(b=1), request(repeat=1), request("layer", rounds=4)]

    def samples(results):
        return {r.request: [o.samples_us for o in r.outcomes] for r in results}

    forwards, backwards = samples(answer(*requests)), samples(answer(*reversed(requests)))
    assert forwards == backwards and samples(answer(requests[2])) == {requests[2]: forwards[requests[2]]}
    assert forwards[requests[0]] != forwards[requests[3]]
    assert samples(answer(*requests, seed=1)) != forwards


def test_compiling_is_charged_once_for_all_batch_sizes() -> None:
    evaluator = ReplayEvaluator(TABLE, PROBLEM, compile_processes=1)
    first, again, other = evaluator.run([request(b=64), request(b=1), request("down")])
    assert all(o.compile_s > 0 for o in first.outcomes) and not any(o.compile_s for o in again.outcomes)
    assert all(o.compile_s > 0 for o in other.outcomes)
    spent = sum(o.compile_s + o.measure_s for r in (first, again, other) for o in r.outcomes)
    assert evaluator.clock_s() == pytest.approx(spent)
    fresh = ReplayEvaluator(TABLE, PROBLEM, compile_processes=1)
    fresh.recall([first, again, other])
    assert fresh.clock_s() == pytest.approx(spent)
    assert not any(o.compile_s for r in fresh.run([request(b=256)]) for o in r.outcomes)


def test_compile_only() -> None:
    (result,) = answer(request(rounds=0, count=144))
    assert {o.failure for o in result.outcomes} == {None, "compile"}
    assert not any(o.samples_us for o in result.outcomes)


def test_early_stopping_keeps_one_sample_of_the_slow() -> None:
    (free,) = answer(request(count=96))
    bound = float(np.median([o.samples_us[0] for o in free.outcomes if o.samples_us]))
    (result,) = answer(request(count=96, stop_above_us=bound))
    lengths = {len(o.samples_us): o.samples_us[0] > bound for o in result.outcomes if o.samples_us}
    assert lengths == {1: True, 5: False}
    (all_of_them,) = answer(request(count=96, stop_above_us=bound, interleaved=True))
    assert {len(o.samples_us) for o in all_of_them.outcomes if o.samples_us} == {5}


def test_a_layer_is_its_parts_and_the_recorded_rest() -> None:
    up, down, other = CONFIGS["up"][0], CONFIGS["down"][0], CONFIGS["down"][1]
    table = Table(
        with_rows(
            row("up", (up,), (10.0,)), row("down", (down,), (5.0,)), row("down", (other,), (7.0,)),
            row("layer", (up, down), (18.0,)),
        )
    )  # fmt: skip
    (result,) = ReplayEvaluator(table).run([Request("layer", 64, ((up, down), (up, other)), 2)])
    assert [o.samples_us for o in result.outcomes] == [(18.0, 18.0), (20.0, 20.0)]  # 3 us are no GEMM's
    assert (table.median_us("layer", 64, (up, other)), table.rest_us(64), table.rest_us(1)) == (20.0, 3.0, 0.0)


def layers(table: Table, *pairs: tuple) -> list[tuple[float, ...] | str | None]:
    (result,) = ReplayEvaluator(table).run([Request("layer", 64, pairs, 2, True)])
    return [outcome.samples_us or outcome.failure for outcome in result.outcomes]


def test_a_sum_never_races_a_measured_layer() -> None:
    """The layer that was timed reads 30 us, its parts and the rest 18: beside it, the sum of the other's, 19, would win by how it
    came about. Where one of a request was not timed, all are sums; where all were, or no sum can be formed, none is."""
    up, down, other, unknown = CONFIGS["up"][0], CONFIGS["down"][0], CONFIGS["down"][1], CONFIGS["down"][2]
    rows = [row("up", (up,), (10.0,)), row("down", (down,), (5.0,)), row("down", (other,), (6.0,))]
    timed = [row("layer", (up, down), (30.0,)), row("layer", (up, down), failure="timeout")]
    quick = [row("up", (CONFIGS["up"][1],), (1.0,)), row("down", (CONFIGS["down"][1],), (6.0,))]
    table = Table(with_rows(*rows, *quick, timed[0], row("layer", (CONFIGS["up"][1], other), (7.0,))))
    assert table.rest_us(64) == 7.5  # between 15 and 0
    assert layers(table, (up, down), (up, other)) == [(22.5, 22.5), (23.5, 23.5)]
    assert layers(table, (up, down)) == [(30.0, 30.0)]
    assert layers(table, (up, down), (up, unknown)) == [(30.0, 30.0), "unrecorded"]
    failed = Table(with_rows(*rows, timed[1]))
    assert layers(failed, (up, down), (up, other)) == ["timeout", (16.0, 16.0)], "a layer that failed is no sum"


def test_the_parts_of_sums_are_of_one_protocol() -> None:
    """Finals read 0.8 times as much. DOWN alone has one of GEMM2: the short looks of both stand in, by the same ratio."""
    down, other = CONFIGS["down"][:2]
    rows = [
        row("up", UP, (10.0,)),
        row("down", (down,), (5.0,)),
        final("down", (down,), (4.0,)),
        row("down", (other,), (6.0,)),
    ]
    more = [row("down", (CONFIGS["down"][2],), (10.0,)), final("down", (CONFIGS["down"][2],), (9.0,))]
    table = Table(with_rows(*rows, *more))  # ratio: between 0.8 and 0.9
    assert layers(table, (*UP, down), (*UP, other)) == [pytest.approx((14.25,) * 2), pytest.approx((15.1,) * 2)]
    assert layers(table, (*UP, down)) == [(14.0, 14.0)]


def test_what_was_not_recorded_is_a_failure_not_a_guess() -> None:
    table = Table(with_rows(row("up", UP, (10.0,))))
    asked = [Request("up", 64, ((CONFIGS["up"][1],), UP), 2), Request("down", 64, (UP,), 2), Request("up", 1, (UP,), 2)]
    asked.append(Request("layer", 64, (UP * 2,), 2))
    found = [[o.failure for o in r.outcomes] for r in ReplayEvaluator(table).run(asked)]
    assert found == [["unrecorded", None], ["unrecorded"], ["unrecorded"], ["unrecorded"]]


# --- two protocols -----------------------------------------------------------------------------------------------------


def final(stage: str, contender: tuple, samples: tuple = (), failure: str | None = None) -> Row:
    return dataclasses.replace(row(stage, contender, samples, failure), interleaved=True)


def drawn(table: Table, config: KernelConfig, *, interleaved: bool) -> tuple[float, ...]:
    asked = Request("up", 64, ((config,),), 3, interleaved)
    return next(ReplayEvaluator(table).run([asked])).outcomes[0].samples_us


BOTH, SHORT, FINAL, FAILED, OTHER = CONFIGS["up"][:5]
TWO = Table(
    with_rows(
        row("up", (BOTH,), (10.0,)), final("up", (BOTH,), (8.0,)), row("up", (OTHER,), (20.0,)),
        final("up", (OTHER,), (16.0,)), row("up", (SHORT,), (5.0,)), final("up", (FINAL,), (12.0,)),
        row("up", (FAILED,), (9.0,)), final("up", (FAILED,), failure="wrong"),
    )
)  # fmt: skip


@pytest.mark.parametrize(("config", "short", "in_finals"), [(BOTH, 10.0, 8.0), (SHORT, 5.0, 4.0), (FINAL, 15.0, 12.0)])
def test_a_request_is_answered_in_its_own_protocol(config: KernelConfig, short: float, in_finals: float) -> None:
    """Finals read 0.8 times as much here; what has only one of the two stands in for the other by that ratio."""
    assert drawn(TWO, config, interleaved=False) == pytest.approx((short,) * 3)
    assert drawn(TWO, config, interleaved=True) == pytest.approx((in_finals,) * 3)
    assert TWO.median_us("up", 64, (config,)) == pytest.approx(in_finals)


def test_what_fails_in_the_finals_has_no_true_time() -> None:
    assert math.isnan(TWO.median_us("up", 64, (FAILED,))) and drawn(TWO, FAILED, interleaved=True) == ()
    assert drawn(TWO, FAILED, interleaved=False) == (9.0,) * 3


def test_a_landscape_without_finals_has_one_protocol() -> None:
    assert TABLE.finals == TABLE.cells and drawn(TABLE, BOTH, interleaved=True)


def test_what_a_layer_takes_beyond_its_gemms_is_told_from_the_finals() -> None:
    down = CONFIGS["down"][0]
    rows = (*TWO.landscape.rows, row("down", (down,), (5.0,)), final("down", (down,), (4.0,)))
    assert Table(with_rows(*rows, row("layer", (BOTH, down), (14.0,)))).rest_us(64) == pytest.approx(2.0)


@pytest.mark.parametrize("factor", [0.5, 0.87, 1.14])
def test_a_protocol_that_reads_otherwise_changes_no_regret(factor: float) -> None:
    """A race whose finals all read a factor more chooses as before, and its regret is the same at every moment."""
    problem = small_problem((16, 64))
    plain = synthetic_landscape(problem)
    timed = [r for r in plain.rows if r.outcome.samples_us][::7]

    def traced(by: float) -> list[Point]:
        finals = [
            dataclasses.replace(r, interleaved=True, outcome=Outcome(tuple(by * s for s in r.outcome.samples_us)))
            for r in timed
        ]
        table = Table(dataclasses.replace(plain, rows=(*plain.rows, *finals)))
        return trace(Truth(table, problem), "race", 0, every=5)

    for one, other in zip(traced(1.0), traced(factor), strict=True):
        assert (one.phase, one.samples) == (other.phase, other.samples)
        assert other.median == pytest.approx(one.median, abs=1e-9) and other.worst == pytest.approx(one.worst, abs=1e-9)


def test_another_layer_is_refused() -> None:
    for changed, words in [
        (small_problem((1, 2)), "no batch size 2"),
        (dataclasses.replace(PROBLEM, device="NVIDIA B200"), "NVIDIA B200"),
        (dataclasses.replace(PROBLEM, shape=PROBLEM.shape.shard(2)), "sizes"),
    ]:
        with pytest.raises(LandscapeError, match=words):
            ReplayEvaluator(TABLE, changed)
    ReplayEvaluator(TABLE, dataclasses.replace(PROBLEM, shape=dataclasses.replace(PROBLEM.shape, name="other")))
