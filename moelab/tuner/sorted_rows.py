"""Where pairs lie among rows that are sorted by expert and padded, as `gated_gemm` writes them and `sorted_gemm` reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.routing import Alignment


def places(alignment: Alignment, topk_ids: Tensor) -> Tensor:
    """(pairs,) int64: each pair's row; -1 for pairs of expert -1, whose rows nothing writes and nothing reads."""
    used = alignment.sorted_token_ids[: int(alignment.num_tokens_post_padded)].long()
    rows = (used < alignment.num_pairs).nonzero().flatten()
    found = torch.full((alignment.num_pairs,), -1, dtype=torch.long, device=used.device)
    found[used[rows]] = rows
    return found.masked_fill(topk_ids.flatten() < 0, -1)


def gathered(rows: Tensor, place: Tensor) -> Tensor:
    """(pairs, N) in the order of pairs, from (rows, N) at `places`; zeros for pairs of expert -1."""
    return rows[place.clamp(min=0)].masked_fill((place < 0)[:, None], 0.0)


def laid(pairs: Tensor, place: Tensor, num_rows: int) -> Tensor:
    """(num_rows, N) with each of (pairs, N) at its place, and NaN in every other row: no result may come of those."""
    rows = torch.full((num_rows, pairs.shape[1]), float("nan"), dtype=pairs.dtype, device=pairs.device)
    rows[place[place >= 0]] = pairs[place >= 0]
    return rows
