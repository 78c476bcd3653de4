"""A serving run: requests that arrive as a Poisson process, through transformers' continuous batching.

Names as in sglang's and vLLM's bench_serving, so that tables compare: TTFT from a request's arrival to its first token, TPOT the
mean time of the following ones, ITL the time between two tokens of a request, output tokens a second from the first arrival to
the last token. The clock is that of the thread which generates; the client waits in another.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab.errors import RuntimeModeError
from moelab.serving.steps import random_ids

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """requests of prompt_tokens and new_tokens each, `rate` of them a second in the mean (infinity: all at once). runs: of each
    contender, in turns. limit_s: of one run."""

    requests: int = 16
    prompt_tokens: int = 512
    new_tokens: int = 32
    rate: float = 8.0
    runs: int = 1
    limit_s: float = 60.0

    def arrivals(self, seed: int) -> list[float]:
        """Seconds from the start, ascending; the same for every contender of a run."""
        if math.isinf(self.rate):
            return [0.0] * self.requests
        return np.random.default_rng(seed).exponential(1 / self.rate, self.requests).cumsum().tolist()


def serve(model: Any, load: Load, seed: int = 0) -> dict[str, Any]:
    """One run with the model's experts as they are switched: ttft_ms, tpot_ms, itl_ms (lists), duration_s, output_tok_s.

    Raises RuntimeModeError where a request failed, the generation died, or not all were done within load.limit_s.
    """
    prompts = random_ids(model, load.requests, load.prompt_tokens, seed).tolist()
    manager = _manager(model, load)
    manager.start()
    try:
        due, done = _served(manager, prompts, load, seed)
    finally:
        manager.stop(block=True, timeout=load.limit_s, hard_stop=True)  # what is done is done; what is not failed
    return _times(due, done)


def _manager(model: Any, load: Load) -> Any:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pages = -(-(load.prompt_tokens + load.new_tokens) // 256) + 1
    options = GenerationConfig(max_new_tokens=load.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return model.init_continuous_batching(
        generation_config=options,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=max(8, load.requests * pages),
            max_batch_tokens=most_tokens(load),
            max_requests_per_batch=load.requests,
        ),
    )


def most_tokens(load: Load) -> int:
    """Of one forward of the run."""
    return max(256, min(8192, load.requests * load.prompt_tokens))


def _served(
    manager: Any, prompts: Sequence[list[int]], load: Load, seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(when each request was due, its output), by the request's id."""
    begin = time.perf_counter()
    due: dict[str, float] = {}
    for number, (prompt, after) in enumerate(zip(prompts, load.arrivals(seed), strict=True)):
        time.sleep(max(0.0, begin + after - time.perf_counter()))
        due[f"request {number}"] = begin + after
        manager.add_request(
            prompt,
            request_id=f"request {number}",
            max_new_tokens=load.new_tokens,
            record_timestamps=True,
            eos_token_id=-1,
        )
    done: dict[str, Any] = {}
    while len(done) < len(due):
        left = begin + load.limit_s - time.perf_counter()
        output = manager.get_result(timeout=1.0) if left > 0 and manager.is_running() else None
        if output is None and (left <= 0 or not manager.is_running()):
            how = (
                f"were not done within {load.limit_s:.0f} s"
                if left <= 0
                else "were dropped: the generation thread has died"
            )
            raise RuntimeModeError(
                f"{len(due) - len(done)} of {len(due)} requests {how}. Expected tokens of all of them. Lower the number of "
                "requests or of tokens, or see what transformers' generation thread has logged."
            )
        if output is not None and output.error:
            raise RuntimeModeError(
                f"A request failed: {output.error[:200]}. Expected tokens. Lower the number of requests or of tokens."
            )
        if output is not None and output.is_finished():
            done[output.request_id] = output
    return due, done


def _times(due: Mapping[str, float], done: Mapping[str, Any]) -> dict[str, Any]:
    ttft, tpot, itl, tokens, last = [], [], [], 0, 0.0
    for name, output in done.items():
        stamps = output.timestamps
        ttft.append(stamps[0] - due[name])
        gaps = [after - before for before, after in itertools.pairwise(stamps)]
        itl += gaps
        if gaps:
            tpot.append(statistics.fmean(gaps))
        tokens, last = tokens + len(stamps), max(last, stamps[-1])
    duration = last - min(due.values())
    lists = {"ttft_ms": ttft, "tpot_ms": tpot, "itl_ms": itl}
    return {name: [round(one * 1e3, 3) for one in values] for name, values in lists.items()} | {
        "duration_s": duration, "output_tokens": tokens, "output_tok_s": tokens / duration,
    }  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """p50, p90, p99 of each list over a contender's runs, and their median output tokens a second."""
    found = {
        f"{name.removesuffix('_ms').upper()} p{p}, ms": float(np.percentile([x for row in rows for x in row[name]], p))
        for name in ("ttft_ms", "tpot_ms", "itl_ms")
        for p in PERCENTILES
    }
    return found | {"output tok/s": statistics.median(row["output_tok_s"] for row in rows)}
