"""The packed layer is the layer, and a row's bits do not depend on the rows beside it."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.model.packed import PackedLinear, can_pack

SHAPES = [
    (768, 768),
    (768, 3072),
    (96, 32),
    (61, 48),
    (33, 17),
    (7, 5),
    (1, 1),
    (5, 127),
    (130, 257),
    (3, 3072),
    (256, 1000),
]
"""(out, in), odd ones too. With 3072 inputs oneDNN shares the sums of a single row out."""
ROWS = (1, 2, 3, 5, 8, 13, 16, 31, 32, 63)

pytestmark = pytest.mark.skipif(not can_pack(torch.ones(1, 1)), reason="this torch has no oneDNN")


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def drawn(out: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and 64 rows."""
    return torch.randn(out, inputs) * inputs**-0.5, torch.randn(out), torch.randn(64, inputs)


@pytest.mark.usefixtures("threads")
def test_a_row_has_the_same_bits_with_whatever_rows_it_is_computed() -> None:
    plain_differs = 0
    for out, inputs in SHAPES:
        weight, bias, x = drawn(out, inputs)
        packed, together = PackedLinear(weight, bias), PackedLinear(weight, bias)(x)
        for rows in ROWS:
            assert torch.equal(packed(x[:rows]), together[:rows]), (out, inputs, rows)
            assert torch.equal(packed(x[64 - rows :]), together[64 - rows :]), (out, inputs, rows)
            plain_differs += not torch.equal(F.linear(x[:rows], weight, bias), F.linear(x, weight, bias)[:rows])
        other = weight.index_put((torch.tensor(0), torch.tensor(0)), weight[0, 0] * (1 + 2**-20))
        assert not torch.equal(PackedLinear(other, bias)(x), together), "bits that one weight's last bits do not change"
    if torch.backends.mkl.is_available():
        assert plain_differs, "what was to be shown is true of F.linear too: the test compares nothing"


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_it_is_the_product_in_float64(out: int, inputs: int) -> None:
    weight, bias, x = drawn(out, inputs)
    reference = F.linear(x.double(), weight.double(), bias.double())
    assert (PackedLinear(weight, bias)(x) - reference).abs().max() < 1e-5
    assert (PackedLinear(weight)(x) + bias - reference).abs().max() < 1e-5
    assert (PackedLinear(weight, bias)(x.flip(1)) - reference).abs().max() > 1e-3 or inputs == 1


def test_rows_of_any_shape() -> None:
    weight, bias, x = drawn(7, 5)
    packed = PackedLinear(weight, bias)
    for shape in [(64,), (1, 64), (4, 16), (2, 2, 16)]:
        assert torch.equal(packed(x.view(*shape, 5)), packed(x).view(*shape, 7))
    for shape in [(), (1,), (1, 1)]:
        assert torch.equal(packed(x[0].view(*shape, 5)), packed(x)[0].view(*shape, 7))
    assert packed(x[:0]).shape == (0, 7)
    strided = x.new_empty(5, 64).copy_(x.t()).t()
    assert not strided.is_contiguous() and torch.equal(packed(strided), packed(x))


def test_the_weight_is_copied_and_another_type_is_not_packed() -> None:
    weight, bias, x = drawn(7, 5)
    packed = PackedLinear(weight, bias)
    before = packed(x)
    weight.zero_()
    assert torch.equal(packed(x), before)
    assert not can_pack(torch.ones(7, 5, dtype=torch.float64))
