"""The one-launch layer over fp8 codes on an H200: right part by part, then its times over the floor, in under 90 s.

    python tests/coded_forms.py [--shapes deepseek-v3/tp8 ...] [--batches 16 64 ...] [--seconds 85]

All instances are compiled first, in processes side by side. Then each is checked in a process of its own, which a hang may not
outlive: GEMM1 alone, GEMM2 alone, all, with the largest error of each stage against float64 over what the stage was given. Then
microseconds of the whole layer (order, tiles and codes included) in CUDA graphs over rotated routings, over the floor max(bytes
/ 4.3 TB/s, FLOP / 1300 TFLOP/s), of those instances that passed; beside it the fastest that data/recordings/quantised.json holds.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

BEGUN = time.monotonic()
CHECK_S = 40
DEVICE = "cuda"
ROWS_TRIED = {16: (0, 20), 48: (2, 100), 128: (24, 1e9)}
"""Widest tile -> rows an expert, least and most, that it is timed at."""
SHAPES = ("deepseek-v3/tp8", "qwen3-30b-a3b/tp1", "glm-4.5-air/tp1", "deepseek-v3/ep8")
SIZES = ((3, 8, 2, 256, 128), (70, 6, 2, 384, 256), (300, 3, 2, 512, 384), (1200, 8, 2, 1024, 768))
"""Tokens, experts, top_k, hidden size, inner size."""
BOUNDS = {"inner": 17.0, "scale": 2**-9, "y": 2**-7, "out": 2**-7}
"""Of `stages`: a code's rounding is 16 of its scale at most; bfloat16 rounds y by 2^-8 of itself. The tensor core cuts each of
the four products of a step of K 13 bits behind the largest (`quantised_error.KEPT_BITS`), 2^-11
in all, and inner is a product."""


def forms() -> list[Any]:
    from moelab.kernels.fast_instances import ALL_CODED

    return list(ALL_CODED)


def compiled(number: int) -> tuple[bytes, float, tuple[int, int]]:
    """An instance's object code, pickled; seconds; registers and stack."""
    import torch

    from moelab.kernels import cubin, nvrtc

    begun, instance = time.monotonic(), forms()[number]
    code = nvrtc.compiled("sm_90a", instance.source(torch.bfloat16), instance.expression(torch.bfloat16))
    return pickle.dumps(code), time.monotonic() - begun, cubin.usage(code.code)


def use(folder: str) -> None:
    """Let `nvrtc.compiled` find what was compiled ahead."""
    import torch

    from moelab.kernels import nvrtc

    known = {}
    for number, instance in enumerate(forms()):
        path = Path(folder) / f"{number}.pickle"
        if path.exists():
            key = (instance.source(torch.bfloat16), instance.expression(torch.bfloat16))
            known[key] = pickle.loads(path.read_bytes())
    compile_here = nvrtc.compiled
    nvrtc.compiled = lambda arch, source, expression: (  # type: ignore[assignment]
        known.get((source, expression)) or compile_here(arch, source, expression)
    )


def stages(instance: Any, parts: int, sizes: tuple[int, ...]) -> dict[str, float]:
    """Errors of one launch of those parts over torch's results of the ones before."""
    import torch

    from moelab.formats import get_format
    from moelab.inputs import make_inputs
    from moelab.kernels.expert_order import ordered_tiles
    from moelab.kernels.fast_instances import BLOCK, GEMM1, GEMM2, SUM
    from moelab.kernels.fast_quantised import coded, coded_cut, coded_layer, coded_scratch, scale_place
    from moelab.quantised_weights import dequantise, dequantise_activations, quantise_activations
    from moelab.shapes import MoEShape

    num_tokens, experts, top_k, hidden, size = sizes
    format = get_format("fp8_w8a8_block_128x128")
    shape = MoEShape("forms", experts, top_k, hidden, size, format=format.name)
    i = make_inputs(shape, num_tokens, device=DEVICE, seed=3)
    g = torch.Generator(DEVICE).manual_seed(5)
    for scale in (i.w13_scale, i.w2_scale):  # of very different magnitudes: another's shows
        scale *= torch.exp2(torch.randint(-3, 4, scale.shape, generator=g, device=DEVICE).float())
    spread = torch.exp2(torch.randint(-3, 4, (num_tokens, hidden // BLOCK), generator=g, device=DEVICE).float())
    x = (i.hidden_states * spread.repeat_interleave(BLOCK, 1)).bfloat16()
    ids, weights = i.topk_ids.int(), i.weights
    tiles = ordered_tiles(ids, experts, *coded_cut(instance))
    scratch = coded_scratch(tiles, instance, ids.numel(), weights, x.dtype)
    for each in scratch:
        each.view(torch.uint8).fill_(0xFF)
    inner, inner_scale, y = scratch
    records = tiles.tiles[: int(tiles.num_tiles)].tolist()
    exact_x = dequantise_activations(*quantise_activations(x, format), format)
    w13, w2 = dequantise(weights.up), dequantise(weights.down)
    exact, places = {}, {}
    for tile, (first, rows, expert, _) in enumerate(records):
        slots = tiles.sorted_slots[first : first + rows].long()
        h = exact_x[slots // top_k] @ w13[expert].T
        exact[tile] = torch.nn.functional.silu(h[:, :size]) * h[:, size:]
        places[tile] = torch.tensor(
            [scale_place(row, instance) for row in range(rows)], device=DEVICE, dtype=torch.long
        )
        if not parts & GEMM1 and rows:
            codes, scale = quantise_activations(exact[tile].float(), format)
            inner.view(torch.uint8)[first : first + rows] = codes.view(torch.uint8)
            inner_scale[tile][:, places[tile]] = scale.T
    out = coded_layer(
        coded(x, tiles, top_k, instance, format), weights, i.topk_weights, ids, tiles, instance, x.dtype, parts=parts,
        scratch=scratch,
    )  # fmt: skip
    torch.cuda.synchronize()
    found = {"inner": 0.0, "scale": 0.0, "y": 0.0, "out": 0.0}

    def worst(name: str, error: Any) -> None:
        found[name] = max(found[name], float(error.nan_to_num(nan=float("inf")).max()))

    for tile, (first, rows, expert, _) in enumerate(records):
        if not rows:
            continue
        slots = tiles.sorted_slots[first : first + rows].long()
        scales = inner_scale[tile][:, places[tile]].T
        given = dequantise_activations(inner[first : first + rows], scales, format)
        worst("scale", (scales / quantise_activations(exact[tile].float(), format)[1] - 1).abs())
        worst("inner", (given - exact[tile]).abs().unflatten(1, (-1, BLOCK)) / scales.double().unsqueeze(-1))
        if parts & GEMM2:
            wanted = given @ w2[expert].T * i.topk_weights.flatten()[slots].double()[:, None]
            worst("y", (y[slots].double() - wanted).abs().amax(1) / wanted.abs().amax(1))
    if parts & SUM:
        total = y.double().view(num_tokens, top_k, -1).sum(1)
        worst("out", (out.double() - total).abs() / total.abs().max())
    if tiles.ready.any():
        found["counters left"] = float("inf")
    return {name: error for name, error in found.items() if parts & GEMM2 or name in ("inner", "scale")}


def check(folder: str, number: int) -> int:
    """All parts and sizes of one instance; 1 where an error is over its bound."""
    use(folder)
    wrong = False
    for parts in (1, 2, 7):
        worst: dict[str, float] = {}
        for sizes in SIZES:
            found = stages(forms()[number], parts, sizes)
            bad = [name for name, error in found.items() if not error <= BOUNDS.get(name, 0.0)]
            if bad:
                print(f"parts {parts} {sizes}: {found} WRONG", flush=True)
            wrong |= bool(bad)
            worst = {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
        print(f"parts {parts}: " + " ".join(f"{name} {error:.3g}" for name, error in worst.items()), flush=True)
    return int(wrong)


def short(instance: Any) -> str:
    marks = {"R": instance.scaled == 2, "P": instance.permutes, "C": instance.cluster > 1, "S": not instance.apart}
    return f"{instance.tokens}{''.join(m for m, has in marks.items() if has)}"


def recorded(shape: str, batch: int) -> tuple[float, str]:
    """Microseconds of the fastest that was recorded, and its name."""
    rows = json.loads((Path(__file__).parents[1] / "data" / "recordings" / "quantised.json").read_text())["rows"]
    of = [
        r for r in rows if (r["shape"], r["num_tokens"]) == (shape, batch) and r["format"].startswith("fp8_w8a8_block")
    ]
    found = [
        (sorted(r["samples_us"])[len(r["samples_us"]) // 2], f"{r['impl']} {r['config_name']}")
        for r in of
        if r.get("samples_us")
    ]
    return min(found, default=(float("nan"), "nothing"))


def times(folder: str, passed: list[int], shapes: list[str], batches: list[int], end: float) -> int:
    """A line for each shape and batch as it is measured: over the floor, each instance. Until `end`, by the monotonic clock."""
    use(folder)
    import torch

    from moelab import roofline
    from moelab.call import MoECall
    from moelab.pipelines.fast_quantised import coded_pipeline
    from moelab.suites.layer_classic import Layer, weight_sets
    from moelab.suites.quantised import shape_of
    from moelab.suites.screening import quick

    rows = []
    for name in shapes:
        shape = shape_of(name, "fp8_w8a8_block_128x128")
        weights = weight_sets(shape)
        for batch in batches:
            if time.monotonic() > end:
                print("no time left")
                break
            layer = Layer(shape, batch, 3 if batch >= 4096 else 4, weights)

            def run_of(form: Any, layer: Any = layer) -> Any:
                def run(i: int) -> Any:
                    r = layer.routings[i]
                    given = (layer.states[i], layer.weights[i].weights, r.topk_weights, r.topk_ids)
                    rows = layer.shape.expected_rows(layer.num_tokens)
                    return coded_pipeline(MoECall(*given, expected_rows=rows), form)

                return run

            cost = roofline.layer_cost(shape, batch, experts_touched=layer.experts_touched())
            floor = max(cost.bytes / 4.3e6, cost.flops / 1300e6)
            best, which = recorded(name, batch)
            average = batch * shape.top_k / shape.num_experts / shape.ep_size
            tried = [forms()[n] for n in passed]
            tried = [f for f in tried if ROWS_TRIED[f.tokens][0] <= average <= ROWS_TRIED[f.tokens][1]]
            served = {short(f): run_of(f) for f in tried}
            served["served"] = run_of(None)
            found = {label: one.median_us for label, one in quick(served, len(layer.states)).items()}
            said = " ".join(f"{label} {us / floor:.2f}" for label, us in found.items())
            print(
                f"{name:18}{batch:5} floor {floor:7.1f} us  {said}  recorded {best / floor:.2f} ({which})", flush=True
            )
            rows.append({"shape": name, "num_tokens": batch, "floor_us": floor, "us": found, "recorded_us": best})
            for form in tried if batch == 4096 else ():
                parts = parts_of(layer, form)
                rows[-1][short(form)] = parts
                print(f"{short(form):>8}: " + ", ".join(f"{label} {us:.1f}" for label, us in parts.items()), flush=True)
        del weights
        torch.cuda.empty_cache()
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "coded_forms.json").write_text(json.dumps(rows))
    return 0


def parts_of(layer: Any, instance: Any) -> dict[str, float]:
    """Microseconds of what a call launches, each alone."""
    from moelab.kernels.expert_order import ordered_tiles
    from moelab.kernels.fast_quantised import coded, coded_cut, coded_layer, coded_scratch
    from moelab.suites.screening import quick

    shape, format = layer.shape, layer.shape.format

    def tiled(i: int) -> Any:
        return ordered_tiles(layer.routings[i].topk_ids, shape.num_experts, *coded_cut(instance))

    tiles = [tiled(i) for i in range(len(layer.states))]
    codes = [coded(x, t, shape.top_k, instance, format) for x, t in zip(layer.states, tiles, strict=True)]
    weights = layer.weights[0].weights
    scratch = coded_scratch(tiles[0], instance, layer.num_tokens * shape.top_k, weights, layer.states[0].dtype)

    def run_of(parts: int, **more: Any) -> Any:
        def run(i: int) -> Any:
            r, w = layer.routings[i], layer.weights[i].weights
            return coded_layer(
                codes[i], w, r.topk_weights, r.topk_ids, tiles[i], instance, layer.states[0].dtype, parts=parts,
                scratch=scratch, **more,
            )  # fmt: skip

        return run

    run_of(7)(0)
    asked = {
        "order and tiles": tiled, "codes": lambda i: coded(layer.states[i], tiles[i], shape.top_k, instance, format),
        "GEMM1": run_of(1), "GEMM2": run_of(2), "both": run_of(3), "sums": run_of(4, looks=True),
        "sums of all": run_of(4, looks=False),
    }  # fmt: skip
    return {label: one.median_us for label, one in quick(asked, len(tiles)).items()}


def started(*what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", __file__, *what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    """What it said until it ended or was ended."""
    try:
        return process.communicate(timeout=max(seconds, 1))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + "HANGS\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[4096, 8192, 1024, 256, 64, 16, 4, 1])
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--child", nargs="+")
    asked = parser.parse_args()
    if asked.child:
        folder, kind, rest = asked.child
        if kind == "check":
            return check(folder, int(rest))
        return times(folder, json.loads(rest), asked.shapes, asked.batches, asked.seconds)
    end = BEGUN + asked.seconds
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(len(forms()))
        with ProcessPoolExecutor(min(len(numbers), os.cpu_count() or 1)) as pool:
            for number, (code, seconds, usage) in zip(numbers, pool.map(compiled, numbers), strict=True):
                (Path(folder) / f"{number}.pickle").write_bytes(code)
                print(
                    f"{short(forms()[number]):>6}: {usage[0]} registers, {usage[1]} of stack, {seconds:.0f} s",
                    flush=True,
                )
        running = {n: started("--child", folder, "check", str(n)) for n in numbers}
        check_end, passed = min(time.monotonic() + CHECK_S, end - 20), []
        for number, process in running.items():
            said = finished(process, check_end - time.monotonic())
            print(
                "".join(f"{short(forms()[number]):>6} {line}\n" for line in said.splitlines()[-20:]), end="", flush=True
            )
            passed += [number] if process.returncode == 0 else []
        print(f"{time.monotonic() - BEGUN:.0f} s; passed: {[short(forms()[n]) for n in passed]}", flush=True)
        if passed:
            command = [sys.executable, "-u", __file__, "--child", folder, "times", json.dumps(passed)]
            command += ["--shapes", *asked.shapes, "--batches", *map(str, asked.batches), "--seconds", str(end - 4)]
            try:
                subprocess.run(command, timeout=max(end - time.monotonic(), 5))
            except subprocess.TimeoutExpired:
                print("times: HANGS")
        return int(len(passed) < len(numbers))


if __name__ == "__main__":
    sys.exit(main())
