"""The oracle against the formula written out, one token and one expert at a time."""

from __future__ import annotations

import pytest
import torch
from moe_cases import CASES, Case, reference

from moelab.errors import UnknownNameError
from moelab.reference import activation_ref, grouped_gemm_ref, sum_reduce_ref, swiglu_oai


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_is_its_formula(case: Case) -> None:
    i = case.inputs(torch.float64, "cpu")
    rows = []
    for t in range(case.num_tokens):
        total = torch.zeros(case.hidden, dtype=torch.float64)
        for j in range(case.top_k):
            e, weight = int(i.topk_ids[t, j]), i.topk_weights[t, j].double()
            if e < 0:
                continue
            h = i.w13[e] @ i.hidden_states[t] + (i.b13[e] if case.bias else 0)
            h = activation_ref(weight * h if case.on_input else h, case.activation, gated=case.gated)
            y = i.w2[e] @ h + (i.b2[e] if case.bias else 0)
            total += y if case.on_input else weight * y
        rows.append(total * case.scale)
    torch.testing.assert_close(reference(case, i, torch.float64), torch.stack(rows))


def test_grouped_gemm_by_hand() -> None:
    a, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    out = grouped_gemm_ref(a, w, torch.tensor([[1, -1]]), top_k=2, topk_weights=torch.tensor([[0.5, 9.0]]))
    assert out.tolist() == [[3.0], [0.0]]


def test_sum_reduce_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert sum_reduce_ref(x, 0.5).tolist() == [[2.0, 3.0]]


def test_swiglu_oai_by_hand() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert float(swiglu_oai(one, one)) == pytest.approx(2 / (1 + 2.718281828459045**-1.702))
    assert float(swiglu_oai(100 * one, -100 * one)) == pytest.approx(-6 * 7 / (1 + 2.718281828459045 ** (-1.702 * 7)))


def test_low_precision_rounds_once() -> None:
    x = torch.randn(64, 32).half()
    assert torch.equal(activation_ref(x), activation_ref(x.float()).half())


def test_unknown_activation() -> None:
    with pytest.raises(UnknownNameError, match="Expected one of"):
        activation_ref(torch.zeros(1, 2), "swish")
