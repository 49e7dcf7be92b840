"""Activations by their formulas, and by other houses' code."""

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from gpt2lab.model.activation import ACTIVATIONS
from tests import reference
from tests.reference import assert_differ, assert_same

each_name = pytest.mark.parametrize("name", ACTIVATIONS)
STOCK = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}
"""What transformers calls those that take one number for one."""


def numbers() -> Tensor:
    """From far left to far right, with zero, in rows that can be halved."""
    return torch.linspace(-8, 8, 65, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, -0.7, 0.9])


@each_name
def test_an_activation_is_its_formula(name: str) -> None:
    ours, x = ACTIVATIONS[name], numbers().requires_grad_()
    out = ours.function(x)
    assert out.shape == (65, 4 // ours.inputs) and out.dtype == x.dtype
    truth = reference.activate(x, name)
    assert_same(out, truth, within=1e-12)
    direction = torch.randn_like(out)
    ours_, theirs = (torch.autograd.grad(y, x, direction)[0] for y in (out, truth))
    assert_same(ours_, theirs, within=1e-12, what="gradient")
    for other in ACTIVATIONS.keys() - {name}:
        if ACTIVATIONS[other].inputs == ours.inputs:
            assert_differ(out, ACTIVATIONS[other].function(x), by=1e-4, what=f"{name} and {other}")


@pytest.mark.parametrize(("ours", "theirs"), STOCK.items())
def test_an_activation_is_transformers(ours: str, theirs: str) -> None:
    x = numbers()
    assert_same(ACTIVATIONS[ours].function(x), ACT2FN[theirs](x), within=1e-12)
    assert_differ(ACTIVATIONS[ours].function(x), ACT2FN["silu"](x), by=1e-2, what=f"{ours} and silu")


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    gate, up = x[..., :6], x[..., 6:]
    ours = ACTIVATIONS["swiglu"].function(x)
    assert_same(ours, ACT2FN["silu"](gate) * up, within=1e-14)
    assert_differ(ours, gate * ACT2FN["silu"](up), by=1e-2, what="the halves exchanged")
    neighbours = ACT2FN["silu"](x[..., ::2]) * x[..., 1::2]
    assert_differ(ours, neighbours, by=1e-2, what="gate and gated in turn")


@each_name
def test_an_activation_keeps_the_type(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert ACTIVATIONS[name].function(torch.randn(3, 4, dtype=dtype)).dtype == dtype
