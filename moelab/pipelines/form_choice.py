"""Which form of the fastest layer serves a batch: the one that is predicted fastest, whatever its routing."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moelab import config as config_room
from moelab.chips import get_target
from moelab.config import KernelConfig
from moelab.errors import ConfigError, nearest_names
from moelab.kernels import few_tokens
from moelab.kernels.fast_instances import ALL, Instance
from moelab.kernels.few_tokens import FewTokens
from moelab.pipelines import form_times as times
from moelab.pipelines.form_times import CLASSIC, FEW_TOKENS, GATED, KINDS, ONE_LAUNCH, Chip, Coefficients, Tile
from moelab.pipelines.spread import Batch, Floats, Spread, expected


@dataclass(frozen=True)
class Gated:
    """The implementation "gated_tma" under these configs of GEMM1 and of GEMM2."""

    up: KernelConfig
    down: KernelConfig


@dataclass(frozen=True)
class Classic:
    """The implementation "triton" under these configs of GEMM1 and of GEMM2."""

    up: KernelConfig
    down: KernelConfig


Form = Instance | FewTokens | Gated | Classic
"""What can serve a batch."""

_KIND = {Instance: ONE_LAUNCH, FewTokens: FEW_TOKENS, Gated: GATED, Classic: CLASSIC}

TILES: Mapping[int, tuple[KernelConfig, ...]] = {
    m: tuple(KernelConfig(m, n, k, group, warps, stages) for n, k, group, warps, stages in tiles)
    for m, tiles in {
        16: ((32, 128, 1, 4, 4), (64, 128, 1, 4, 4), (128, 128, 1, 4, 3), (64, 256, 1, 4, 3), (128, 64, 1, 4, 5)),
        32: ((64, 128, 1, 4, 4), (128, 128, 1, 4, 3), (128, 64, 1, 4, 4), (256, 64, 1, 8, 3)),
        64: ((64, 128, 8, 4, 3), (128, 64, 8, 4, 4), (128, 128, 8, 4, 3), (256, 64, 8, 8, 4)),
        128: ((64, 64, 16, 4, 4), (128, 64, 16, 8, 3), (256, 64, 16, 8, 3), (128, 128, 16, 8, 3)),
    }.items()
}
"""BLOCK_SIZE_M -> configs that either GEMM of a Triton layer may have where no file was tuned: those that the study fast_shapes
times, so that each has coefficients of its own."""


class Predicted(NamedTuple):
    """A form, what it takes if tokens choose evenly, and if some experts are far more popular; order or alignment included."""

    form: Form
    even_us: float
    skewed_us: float

    @property
    def us(self) -> float:
        """The geometric mean of both: the host does not know the routing."""
        return float(np.sqrt(self.even_us * self.skewed_us))


class Choice(NamedTuple):
    """The form for a batch, a sentence that says why, and all that serve it, the fastest first."""

    form: Form
    reason: str
    predicted: tuple[Predicted, ...] = ()


def runners_up(choice: Choice, count: int = 8) -> list[Predicted]:
    """What is shown beside a choice: it, the fastest of all, and the fastest of each kind, in order."""
    kinds = {kind_of(each.form): each for each in reversed(choice.predicted)}
    shown = [*choice.predicted[:count], *kinds.values()]
    return [each for each in choice.predicted if each in shown or each.form == choice.form]


def kind_of(form: Form) -> str:
    """One of KINDS."""
    return _KIND[type(form)]


def name_of(form: Form) -> str:
    """Its kind and its tile, as an override names it."""
    if isinstance(form, Instance):
        more = "-cluster" * (form.cluster > 1) + "-permuted" * form.permutes
        return f"{ONE_LAUNCH}:{form.rows}x{form.tokens}x{form.stages}{more}"
    if isinstance(form, FewTokens):
        return f"{FEW_TOKENS}:{form.up.rows}x{form.up.columns}/{form.down.rows}x{form.down.columns}"
    up, down = (f"{c.BLOCK_SIZE_M}x{c.BLOCK_SIZE_N}x{c.BLOCK_SIZE_K}" for c in (form.up, form.down))
    return f"{kind_of(form)}:{up}/{down}"


# --- prediction -----------------------------------------------------------------------------------------------------------


def predict(forms: Sequence[Form], batch: Batch, spread: Spread, chip: Chip, c: Coefficients) -> Floats:
    """Microseconds of each, without order and alignment."""
    found = np.zeros(len(forms))
    of_kind = {kind: [i for i, form in enumerate(forms) if kind_of(form) == kind] for kind in KINDS}
    if one := of_kind[ONE_LAUNCH]:
        instances = [form for form in forms if isinstance(form, Instance)]
        x = columns_of([times.one_launch_features(form, batch, spread, chip) for form in instances])
        own = np.array([c.own_of(ONE_LAUNCH, repr(form), 1)[0] for form in instances])
        found[one] = times.one_launch_us(c.shared[ONE_LAUNCH], x, own)
    if few := of_kind[FEW_TOKENS]:
        near = times.nearness(np.array([times.place_of(batch)]), np.array(c.anchors), np.array(c.widths))[0]
        own = np.array([c.own_of(FEW_TOKENS, repr(forms[i]), len(near) + 1) for i in few])
        x = columns_of([times.few_features(form, batch, spread, chip) for form in forms if isinstance(form, FewTokens)])
        found[few] = times.few_us(c.shared[FEW_TOKENS], x, own[:, 0] + own[:, 1:] @ near)
    for kind in (GATED, CLASSIC):
        if places := of_kind[kind]:
            pairs = [
                (Tile.of(form.up), Tile.of(form.down))
                for form in forms
                if isinstance(form, Gated | Classic) and kind_of(form) == kind
            ]
            found[places] = _triton(kind, pairs, batch, spread, chip, c)
    return found


def _triton(
    kind: str, pairs: Sequence[tuple[Tile, Tile]], batch: Batch, spread: Spread, chip: Chip, c: Coefficients
) -> Floats:
    """Of a Triton layer under pairs of tiles: each tile of either GEMM is predicted once."""
    shared, size, hidden = c.shared[kind], batch.moe_intermediate_size, batch.hidden_size
    total = np.full(len(pairs), float(times.layer_us(shared, times.layer_features(batch, spread, chip))))
    for gemm, (columns, K) in enumerate(((2 * size, hidden), (hidden, size))):
        tiles = list(dict.fromkeys(pair[gemm] for pair in pairs))
        own = np.array([c.own_of(kind, str(tile), 3) for tile in tiles])
        x = columns_of([times.gemm_features(tile, columns, K, spread, chip) for tile in tiles])
        us = times.gemm_us(shared, x, own[:, 0], own[:, 1] + gemm * own[:, 2])
        total += us[[tiles.index(pair[gemm]) for pair in pairs]]
    return total


def columns_of(features: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    """One array for each feature."""
    return {name: np.array([float(each[name]) for each in features]) for name in features[0]}


def before_us(batch: Batch, c: Coefficients) -> dict[str, float]:
    """Of what comes before each kind of form: order and tiles, alignment, or nothing."""
    x = times.before_features(batch)
    order, align = (float(x @ c.before[part]) for part in ("order", "align"))
    return {ONE_LAUNCH: order, FEW_TOKENS: 0.0, GATED: align, CLASSIC: align}


# --- what serves a batch --------------------------------------------------------------------------------------------------


NEAR = 4
"""Tiles of tokens that are recorded, and serve, hold at most so many times the rows that an expert gets, and at least a NEARth of
them; the smallest whatever it gets, and the largest."""


def near_instances(rows: float, among: Sequence[Instance]) -> list[Instance]:
    """Those whose tiles are near so many rows an expert."""
    most, least = max(each.tokens for each in among), 48
    return [each for each in among if min(max(rows, 1.0), most) / NEAR <= each.tokens <= max(NEAR * rows, least)]


def near_blocks(rows: float) -> list[int]:
    """Values of BLOCK_SIZE_M in TILES that are near so many rows an expert."""
    return [m for m in TILES if rows / NEAR <= m <= max(NEAR * rows, min(TILES))] or [max(TILES)]


@functools.lru_cache(maxsize=1024)
def _configs(m: int, K: int, dtype: str) -> tuple[KernelConfig, ...]:
    target = get_target("sm_90")
    return tuple(tile for tile in TILES[m] if not config_room.violations(tile, dtype=dtype, target=target, K=K))


def candidates(batch: Batch, dtype: str = "bfloat16", *, near: bool = True) -> list[Form]:
    """The forms that serve such a batch without a tuned file: of tiles those that are near the rows of an expert, or all."""
    size, hidden = batch.moe_intermediate_size, batch.hidden_size
    few = [each for each in few_tokens.FORMS if few_tokens.serves(each, batch.num_tokens, batch.top_k, hidden, size)]
    blocks = near_blocks(batch.rows) if near else list(TILES)
    pairs = [pair for m in blocks for pair in itertools.product(_configs(m, hidden, dtype), _configs(m, size, dtype))]
    return [
        *(near_instances(batch.rows, ALL) if near else ALL),
        *few,
        *(Gated(*pair) for pair in pairs),
        *(Classic(*pair) for pair in pairs),
    ]


def ranked(batch: Batch, forms: Sequence[Form], chip: Chip, c: Coefficients) -> tuple[Predicted, ...]:
    """Those forms, the one that is predicted fastest first."""
    even, skewed = (predict(forms, batch, expected(batch, skewed=skewed), chip, c) for skewed in (False, True))
    first = before_us(batch, c)
    found = [
        Predicted(form, float(e) + first[kind_of(form)], float(s) + first[kind_of(form)])
        for form, e, s in zip(forms, even, skewed, strict=True)
    ]
    return tuple(sorted(found, key=lambda each: each.us))


def choose(
    batch: Batch, chip: Chip, *, tuned: Sequence[Form] = (), measured: tuple[Form, str] | None = None,
    override: str | None = None, dtype: str = "bfloat16",
) -> Choice:  # fmt: skip
    """What serves a batch, whatever its routing: the host does not know it.

    tuned: forms under configs of tuned files, which take the place of others of their kind. measured: the form that was fastest
    of all when they were measured, and where that is said: it overrules the prediction. override: a kind of form, of which the
    fastest serves, or one form by its name, before either. Raises ConfigError for an override that fits none.
    """
    c = times.fitted()
    predicted = ranked(batch, candidates(batch, dtype), chip, c)
    for form in tuned:
        predicted = with_tuned(form, predicted, batch, chip, c)
    if measured is not None and override is None:
        form, why = measured
        own = next(each for each in (*predicted, *ranked(batch, [form], chip, c)) if each.form == form)
        every = tuple(sorted({own, *predicted}, key=lambda each: each.us))
        return Choice(form, _said(own, batch, why, form in tuned), every)
    if override is None:
        best = predicted[0]
        return Choice(best.form, _said(best, batch, "predicted fastest", best.form in tuned), predicted)
    found = [each for each in predicted if override in (kind_of(each.form), name_of(each.form))]
    if not found:  # a tile far from the rows of an expert, too
        further = [form for form in candidates(batch, dtype, near=False) if override == name_of(form)]
        found = list(ranked(batch, further, chip, c)) if further else []
    if not found:
        raise _no_such(override, predicted)
    return Choice(
        found[0].form, _said(found[0], batch, f"asked for as {override!r}", found[0].form in tuned), predicted
    )


def with_tuned(
    form: Form, predicted: Sequence[Predicted], batch: Batch, chip: Chip, c: Coefficients
) -> tuple[Predicted, ...]:
    """With a tuned form in the place of all others of its kind. If tokens choose evenly, which files are tuned by, it takes what
    the fastest of them is predicted to, or a little less, as recorded tuned configs do: of its own tiles there may be no
    recording. How much more it takes if skewed is by its tiles."""
    kind = kind_of(form)
    best = min((each.even_us for each in predicted if kind_of(each.form) == kind), default=math.inf)
    (own,) = ranked(batch, [form], chip, c)
    even = min(best * c.shared[kind]["tuned"], own.even_us)
    found = Predicted(form, even, even * own.skewed_us / own.even_us)
    return tuple(sorted([found, *(each for each in predicted if kind_of(each.form) != kind)], key=lambda each: each.us))


def _no_such(override: str, predicted: Sequence[Predicted]) -> ConfigError:
    names = [name_of(each.form) for each in predicted]
    kinds = list(dict.fromkeys(kind_of(each.form) for each in predicted))
    return ConfigError(
        f"The form {override!r:.80} serves no such batch here.{nearest_names(override, [*kinds, *names])} Expected a kind, one "
        f"of {', '.join(kinds)}, or one form, such as {', '.join(names[:4])}. `moelab explain --kernel fast` lists those that "
        "do; name one of them, or leave it out (form=, MOELAB_FAST_FORM)."
    )


def _said(found: Predicted, batch: Batch, why: str, tuned: bool) -> str:
    even = f"{batch.rows:.3g} rows an expert if tokens spread evenly"
    by = " under its tuned configs" if tuned else ""
    return (
        f"{name_of(found.form)}{by}, {why}: {found.even_us:.4g} us with {even}, {found.skewed_us:.4g} us if skewed, order or "
        "alignment included"
    )
