"""The winner of a final: what it gains over the default and over the file's config, how sure that is, and a tie's name."""

from __future__ import annotations

from moelab.config import SHORT
from moelab.plots.panel import Panel, Row
from moelab.plots.style import BLUE, GREY, ORANGE, error_bars, grid, number
from moelab.tuner.finals import Contest, Excluded, Finals
from moelab.tuner.problem import Pair
from moelab.tuner.results import BatchResult, Gain

NAMES = {"default": "the loader's default", "current": "the config file that was there"}


def card(finals: Finals, num_tokens: int, excluded: Excluded = (), chosen: Pair | None = None) -> Panel:
    """Every pair of the final with its interval, the winner marked, and the chosen pair ringed. excluded: (batch size,
    pair) that may not win."""
    won = finals.winner(num_tokens, excluded)
    contests = finals.contests(num_tokens)
    figure = grid(
        f"Batch {num_tokens}: {_headline(won)}",
        f"{'measured; ' if finals.measured else ''}{finals.source}; whole layers, 95 % intervals<br>a "
        f"config: {SHORT}; one for both GEMMs, or GEMM1’s | GEMM2’s",
        height=136 + 44 * max(3, len(contests)),
    )
    for contest in reversed(contests):
        is_winner, out = contest.pair == (won.up, won.down), (num_tokens, contest.pair) in excluded
        color = GREY if out else (BLUE if is_winner else ORANGE)
        ring = {"width": 3 if contest.pair == chosen else 0, "color": GREY}
        symbol = "x" if out else ("diamond" if is_winner else "circle")
        figure.add_scatter(
            x=[contest.median_us], y=[label(contest)], mode="markers", showlegend=False,
            marker={"color": color, "size": 14 if is_winner else 9, "symbol": symbol, "line": ring},
            error_x=error_bars([contest.median_us], [contest.low_us], [contest.high_us]) | {"color": color},
            hovertemplate="%{y}: %{x:.2f} µs<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="layer, µs")
    figure.update_yaxes(type="category")
    rows = [_row(c, won, (num_tokens, c.pair) in excluded, c.pair == chosen) for c in contests]
    return Panel(figure, rows, _sentence(won, finals))


def label(contest: Contest) -> str:
    """A pair in words: both configs, or one where they are the same, and whose it is."""
    up, down = contest.pair
    text = up.short() if up == down else f"{up.short()} | {down.short()}"
    return f"{text} ({contest.label})" if contest.label else text


def _headline(won: BatchResult) -> str:
    if won.up is None or won.layer_us is None:
        return "no winner"
    return f"{number(won.layer_us, 4)} µs" + (f", {NAMES[won.kept]} stays" if won.kept else "")


def _row(contest: Contest, won: BatchResult, out: bool, chosen: bool) -> Row:
    marks = {"excluded": out, "winner": contest.pair == (won.up, won.down), "chosen": chosen}
    return {
        "GEMM1 | GEMM2": label(contest),
        "layer, µs": contest.median_us,
        "95 % interval": f"{number(contest.low_us, 4)} … {number(contest.high_us, 4)}",
        "samples": contest.samples,
        "is": ", ".join(name for name, is_so in marks.items() if is_so),
    }


def _sentence(won: BatchResult, finals: Finals) -> str:
    if won.up is None:
        return f"**There is no winner at batch {won.num_tokens}: {won.error}.** Restore an excluded pair."
    gains = [gain_text(each) for each in won.gains if won.kept != each.over]
    kept = f"{NAMES[won.kept].capitalize()} stays: nothing is faster beyond its interval. " if won.kept else ""
    return (
        f"**{kept}{' '.join(gains) or ('' if won.kept else 'Nothing to compare with ran.')}** Gains are medians of ratios of "
        "samples taken side by side, and so can differ from the ratio of the medians. Error: every contender was held to "
        "precision's bound (at most twice torch's own error against float64) before its first sample; its size is not "
        f"recorded. Times are cold, weights from memory as in serving; warm ones are not recorded. {_where(finals)}"
    )


def _where(finals: Finals) -> str:
    if finals.measured:
        return ""
    return "This is a replay: a pair that was never timed as a layer is the sum of its recorded parts."


def gain_text(gain: Gain) -> str:
    """ "Over the default: 1.31 times as fast (1.30 … 1.32)." or that it is a tie."""
    interval = f"({gain.low:.3f} … {gain.high:.3f})"
    if gain.tie:
        return f"Against {NAMES[gain.over]}: a tie, ratio {gain.factor:.3f} {interval}."
    if gain.factor < 1:
        return f"Slower than {NAMES[gain.over]}: {gain.factor:.3f} times as fast {interval}."
    return f"Over {NAMES[gain.over]}: {gain.factor:.3f} times as fast {interval}."
