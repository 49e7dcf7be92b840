"""Rotary embedding by itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.model.rope import RotaryEmbedding
from tests import reference
from tests.reference import assert_differ, assert_same, planted_faults

FAULTS = {name: rules for name, rules in planted_faults(1, 1, [None], rope=True).items() if name.startswith("rope")}


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@given(half=st.integers(1, 5), time=st.integers(1, 9), start=st.integers(0, 2000), base=st.floats(10, 1e6))
def test_rotation_is_the_reference(half: int, time: int, start: int, base: float) -> None:
    x = vectors(2, 3, time, 2 * half, dtype=torch.float64)
    rotated = RotaryEmbedding(2 * half, base=base)(x, torch.arange(start, start + time))
    # The angles are in fp32: an angle of 2000 radians is known to 1e-4.
    assert_same(rotated, reference.rotate(x, start=start, base=base), within=2e-3 if start > 50 else 5e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_rotation_is_not_the_reference_with_a_planted_fault(fault: str) -> None:
    x = vectors(2, 3, 9, 8)
    rotated = RotaryEmbedding(8)(x, torch.arange(9))
    assert_same(rotated, reference.rotate(x.double()), within=2e-6)
    assert_differ(rotated, reference.rotate(x.double(), rules=FAULTS[fault]), by=0.1, what=fault)
    assert_differ(rotated, reference.rotate(x.double(), start=1), by=0.1, what="one position late")
    assert_differ(rotated, reference.rotate(x.double(), base=5000.0), by=0.01, what="another base")


def test_a_query_and_a_key_meet_at_an_angle_of_their_distance() -> None:
    rope, q, k = RotaryEmbedding(8), vectors(1, 1, 1, 8), vectors(1, 1, 1, 8)

    def score(q_position: int, k_position: int) -> Tensor:
        return (rope(q, torch.tensor([q_position])) * rope(k, torch.tensor([k_position]))).sum()

    for shift in [1, 10, 1000]:
        assert_same(score(7 + shift, 4 + shift), score(7, 4), within=1e-3)
        assert_differ(score(7 + shift, 4), score(7, 4), by=1e-2, what=f"{shift} further apart")
    assert_same(score(0, 0), (q * k).sum(), within=0)
    assert_differ(score(4, 7), score(7, 4), by=1e-2, what="the key ahead of the query")


def test_rotation_keeps_lengths() -> None:
    x = vectors(2, 3, 9, 8)
    assert_same(RotaryEmbedding(8)(x, torch.arange(9)).norm(dim=-1), x.norm(dim=-1), within=1e-6)


def test_positions_stay_apart_in_half_precision() -> None:
    """bf16 itself cannot count past 256: 1001 would be 1000."""
    rope, x = RotaryEmbedding(8), vectors(1, 1, 1, 8)
    for position in [1000, 1001]:
        exact = rope(x, torch.tensor([position]))
        half = rope(x.bfloat16(), torch.tensor([position]))
        assert half.dtype == torch.bfloat16
        assert_same(half, exact, within=0.03)
    assert_differ(half, rope(x, torch.tensor([1000])), by=0.2, what="one position early")


def test_rotation_holds_no_weights_and_no_table() -> None:
    rope = RotaryEmbedding(8, 16)
    assert not rope.state_dict() and not list(rope.buffers())
    assert rope(vectors(1, 1, 1, 8), torch.tensor([10**6])).isfinite().all()


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="dim must be even; it is 7"):
        RotaryEmbedding(7)
