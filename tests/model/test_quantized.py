"""Eight and four bits: what they stand for, what is computed with them, and that rows are each for themselves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.model import quantized
from gpt2lab.model.quantized import LEVELS, Int8Embedding, Int8Linear, dequantize, has_int8, quantize
from gpt2lab.model.quantized4 import GROUP, Int4Linear, dequantize4, fits_int4, quantize4, unpacked

SHAPES = [(768, 768), (64, 3072), (96, 32), (61, 48), (33, 17), (7, 5), (1, 1), (5, 127), (130, 257)]
ROWS = (1, 2, 3, 5, 8, 13, 16, 31, 63)

pytestmark = pytest.mark.skipif(not has_int8(), reason="this torch has no FBGEMM")


def drawn(out: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and 64 rows of which each has a middle and a width of its own, and some large numbers."""
    x = torch.randn(64, inputs) * torch.rand(64, 1) * 3 + torch.randn(64, 1)
    x[:, inputs // 2] *= 10
    return torch.randn(out, inputs) * inputs**-0.5, torch.randn(out), x


def in_eight_bits(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, levels: int = LEVELS) -> np.ndarray:
    """The definition, row by row and output by output, with integers."""
    ys = np.empty((len(x), len(weight)))
    inverse = np.float32(1) / np.float32(1 / levels)  # nearly `levels`: numbers halfway between two steps are common
    for r, row in enumerate(x.numpy()):
        low, span = row.min(), row.max() - row.min()
        q = np.rint((row - low) / span * inverse).astype(np.int64)
        for o, w in enumerate(weight.numpy().astype(np.int64)):
            exact = float(span) / levels * int(w @ q) + float(low) * int(w.sum())
            ys[r, o] = float(scale[o]) * exact + float(bias[o])
    return ys


def test_eight_bits_a_weight() -> None:
    weight = torch.randn(5, 30) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0])[:, None]
    weight[3] = 0
    q, scale = quantize(weight)
    assert q.dtype == torch.int8 and torch.equal(
        q.abs().amax(1), torch.tensor([127, 127, 127, 0, 127], dtype=torch.int8)
    )
    assert ((dequantize(q, scale) - weight).abs() <= scale[:, None] * 0.5001).all()
    assert ((dequantize(q, scale.flip(0)) - weight).abs() > scale[:, None]).any()
    experts, scales = quantize(weight.view(5, 6, 5))
    assert experts.shape == (5, 6, 5) and scales.shape == (5, 6)
    assert torch.equal(experts[2], quantize(weight.view(5, 6, 5)[2])[0])


@pytest.mark.parametrize(("out", "inputs"), SHAPES[1:])
def test_it_is_the_definition(out: int, inputs: int) -> None:
    weight, bias, x = drawn(out, inputs)
    q, scale = quantize(weight)
    x = x[:9]
    expected = in_eight_bits(x, q, scale, bias) if inputs > 1 else (dequantize(q, scale).double() * x + bias).numpy()
    within = 1e-5 * np.abs(expected).max()
    assert np.abs(Int8Linear(q, scale, bias)(x).numpy() - expected).max() < within
    assert np.abs((Int8Linear(q, scale)(x) + bias).numpy() - expected).max() < within
    if inputs > 1:
        fewer = in_eight_bits(x, q, scale, bias, LEVELS - 1)
        assert np.abs(fewer - expected).max() > 10 * within, "a step too few is not seen"


def test_a_scale_a_row_with_an_offset_is_nearer_than_the_plain_ways() -> None:
    weight, bias, x = drawn(96, 256)
    exact = F.linear(x.double(), weight.double(), bias.double())

    def error(y: Tensor) -> float:
        return float((y - exact).norm() / (exact - exact.mean(1, keepdim=True)).norm())

    def absmax(largest: Tensor) -> Tensor:
        return F.linear((x / largest * 127).round() * largest / 127, dequantize(*quantize(weight)), bias)

    ours = error(Int8Linear(*quantize(weight), bias)(x))
    assert ours < 0.015
    assert error(absmax(x.abs().amax(1, keepdim=True))) > 1.2 * ours, "one scale a row, no offset"
    assert error(absmax(x.abs().max())) > 3 * ours, "one scale for all rows"
    assert error(Int8Linear(*quantize(weight), bias, levels=127)(x)) < 2 * ours


def test_products_stay_within_sixteen_bits_where_the_kernel_adds_two_there() -> None:
    assert (255 if torch.cpu._is_vnni_supported() else 127) == quantized.LEVELS
    assert 2 * 127 * 127 < 2**15 < 2 * 255 * 127
    weight = torch.full((3, 64), 127, dtype=torch.int8)
    x = torch.ones(2, 64)
    x[:, 0] = 0  # as many largest products as there can be
    for levels in {127, LEVELS}:
        assert torch.allclose(Int8Linear(weight, torch.ones(3), levels=levels)(x), torch.tensor(63.0 * 127))


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_a_row_has_the_same_bits_with_whatever_rows_it_is_computed(out: int, inputs: int) -> None:
    weight, bias, x = drawn(out, inputs)
    layers = [Int8Linear(*quantize(weight), bias), Int8Linear(*quantize(weight))]
    if fits_int4(weight):
        layers += [Int4Linear(*quantize4(weight), bias), Int4Linear(*quantize4(weight))]
    for layer in layers:
        together = layer(x)
        for rows in ROWS:
            assert torch.equal(layer(x[:rows]), together[:rows]), (layer, rows)
            assert torch.equal(layer(x[64 - rows :]), together[64 - rows :]), (layer, rows)
    assert not torch.equal(layers[0](x), layers[1](x))
    absmax = (x / x.abs().max() * 127).round(), (x[:1] / x[:1].abs().max() * 127).round()
    assert inputs == 1 or not torch.equal(absmax[0][:1], absmax[1]), "a scale for all rows would tie them together"


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 20), st.integers(0, 2**32))
def test_rows_are_alone_at_any_size(inputs: int, out: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(out, inputs, generator=generator), torch.randn(rows, inputs, generator=generator)
    layer = Int8Linear(*quantize(weight), torch.randn(out, generator=generator))
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_rows_without_width_or_without_numbers() -> None:
    weight, bias, x = drawn(7, 12)
    layer = Int8Linear(*quantize(weight), bias)
    exact = dequantize(*quantize(weight))
    x[1], x[2], x[3, 4], x[5, 0] = 0, -2.5, float("nan"), float("inf")
    y = layer(x)
    assert torch.equal(y[1], bias)
    assert torch.allclose(y[2], exact.sum(1) * -2.5 + bias, atol=1e-5)
    bad = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor([3, 5]), True)
    assert not y[bad].isfinite().any() and y[~bad].isfinite().all()
    assert layer(x[:0]).shape == (0, 7) and layer(x.view(4, 16, 12)).shape == (4, 16, 7)


def test_an_embedding_looks_up_what_the_head_multiplies_with() -> None:
    weight, _, _ = drawn(61, 48)
    q, scale = quantize(weight)
    rows = Int8Embedding(q, scale)(torch.arange(61).view(1, 61))
    assert rows.shape == (1, 61, 48) and torch.equal(rows[0], dequantize(q, scale))
    x = torch.randn(3, 48)
    head = Int8Linear(q, scale)(x)
    assert (head - F.linear(x, rows[0])).abs().max() < 0.02 * head.std()
    assert not torch.equal(rows[0], weight)


# --- Four bits --------------------------------------------------------------------------------------------------------


def test_four_bits_a_weight() -> None:
    weight = torch.randn(16, 3 * GROUP) + torch.randn(16, 1)
    weight[3, GROUP : 2 * GROUP] = 0.25
    packed, scales = quantize4(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (16, 3 * GROUP // 2) and scales.shape == (16, 3, 2)
    assert torch.equal(unpacked(packed)[:, 0], packed[:, 0] & 15) and torch.equal(
        unpacked(packed)[:, 1], packed[:, 0] >> 4
    )
    step = scales[..., 0].float().repeat_interleave(GROUP, dim=1)
    error = (dequantize4(packed, scales) - weight).abs()
    assert (error <= 0.5 * step + 2**-7 * weight.abs().amax()).all(), "half a step, and bf16's rounding of both ends"
    assert torch.allclose(dequantize4(packed, scales)[3, GROUP : 2 * GROUP], torch.tensor(0.25))
    swapped = (packed >> 4) | (packed << 4)
    assert ((dequantize4(swapped, scales) - weight).abs() > 2 * step).any()


@pytest.mark.parametrize(("out", "inputs"), [(16, 32), (48, 96), (768, 64), (64, 3072)])
def test_four_bits_are_multiplied(out: int, inputs: int) -> None:
    weight, bias, x = drawn(out, inputs)
    packed, scales = quantize4(weight)
    exact = F.linear(x.double(), dequantize4(packed, scales).double(), bias.double())
    y = Int4Linear(packed, scales, bias)(x.view(4, 16, inputs)).view(64, out)
    assert y.dtype == torch.float32 and (y - exact).abs().max() < 0.02 * exact.abs().max(), "bf16"
    assert (Int4Linear(packed, scales.flip(0), bias)(x) - exact).abs().max() > 0.1 * exact.abs().max()
    assert not fits_int4(weight[:-1]) and not fits_int4(weight[:, :-1]) and fits_int4(weight)
