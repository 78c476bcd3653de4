"""Activations against float64, rounded once, at widths that are no tile's."""

from __future__ import annotations

import pytest
import torch

from moelab import precision
from moelab.double_double import wide, wide_activation
from moelab.errors import DtypeError, ShapeError, UnknownNameError
from moelab.kernels.activation import activation
from moelab.reference import GATED, UNGATED, activation_ref

KINDS = [(kind, True) for kind in GATED] + [(kind, False) for kind in UNGATED]


def judge(x: torch.Tensor, kind: str, gated: bool) -> None:
    out = activation(x, kind, gated=gated)
    wider = x.dtype == torch.float64  # not what float64 itself gives, which would be taken for right
    exact = wide_activation(wide(x), kind, gated).high if wider else activation_ref(x.double(), kind, gated=gated)
    precision.check(out, activation_ref(x, kind, gated=gated), exact, name=f"{kind} {gated} {x.dtype}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "gated"), KINDS)
def test_against_float64(kind: str, gated: bool, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device=device).manual_seed(0)
    for rows, N in ((3, 33), (1, 1500)):
        x = torch.randn(rows, 2 * N if gated else N, generator=generator, device=device) * 4
        judge(x.to(dtype), kind, gated)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "gated"), KINDS)
def test_on_the_gpu(kind: str, gated: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(4097, 2 * 777 if gated else 777, generator=generator, device="cuda") * 4
    judge(x.to(dtype), kind, gated)


def test_float32_sums_are_rounded_once(device: str) -> None:
    x = torch.randn(5, 66, device=device) * 4
    assert torch.equal(activation(x, dtype=torch.float16), activation(x).half())
    with pytest.raises(DtypeError, match=r"out is float32\. Expected float16"):
        activation(x, dtype=torch.float16, out=torch.empty(5, 33, device=device))


def test_far_tails_stay_finite(device: str) -> None:
    x = torch.tensor([[-100.0, 100.0, -100.0, 100.0]], device=device)
    for kind in GATED:
        assert torch.isfinite(activation(x, kind)).all()


@pytest.mark.parametrize(("kind", "gated"), KINDS)
def test_nan_stays_nan(kind: str, gated: bool, device: str) -> None:
    """A clamp that drops NaN would hide a broken layer; in bf16 or float32, on a GPU above all."""
    for place in (0, 1):
        x = torch.ones(1, 2, device=device)
        x[0, place] = float("nan")
        assert activation(x, kind, gated=gated).isnan().any()


def test_swiglu_oai_clamps_as_gpt_oss_does(device: str) -> None:
    out = activation(torch.tensor([[9.0, -9.0, 9.0, -9.0]], device=device), "swiglu_oai")
    expected = torch.tensor(
        [8 * 7 / (1 + torch.exp(torch.tensor(-1.702 * 7))), -6 * -9 / (1 + torch.exp(torch.tensor(1.702 * 9)))]
    )
    torch.testing.assert_close(out[0].cpu(), expected)


def test_wrong_calls(device: str) -> None:
    x = torch.zeros(2, 7, device=device)
    with pytest.raises(ShapeError, match="even number"):
        activation(x)
    with pytest.raises(UnknownNameError, match="Did you mean"):
        activation(x, "sillu")
    with pytest.raises(UnknownNameError, match="ungated"):
        activation(x, "swiglu_oai", gated=False)
    assert activation(torch.zeros(0, 8, device=device)).shape == (0, 4)
