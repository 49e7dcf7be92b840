"""Rotary embedding by itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.config import GPT2Config
from gpt2lab.model.rope import RotaryEmbedding, ntk_base
from tests import reference
from tests.reference import assert_differ, assert_same, planted_faults

FAULTS = {name: rules for name, rules in planted_faults(GPT2Config(position="rope")).items() if name.startswith("rope")}


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


# --- Further than it was trained --------------------------------------------------------------------------------------

TRAINED, BASE, DIM = 256, 500.0, 16
"""Tokens that a model of these tests learned from. Of its 8 pairs the first turns 41 times in them, and the last 0.2 times."""


def scaled(scaling: str | None, factor: float = 4.0, *, dim: int = DIM, base: float = BASE) -> RotaryEmbedding:
    return RotaryEmbedding(dim, round(TRAINED * factor), base=base, scaling=scaling, factor=factor)


each_scaling = pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])


@each_scaling
@given(half=st.integers(2, 32), time=st.integers(1, 9), base=st.floats(30, 1e6), factor=st.integers(2, 32))
def test_scaled_rotation_is_the_reference(scaling: str, half: int, time: int, base: float, factor: int) -> None:
    x = vectors(2, 3, time, 2 * half, dtype=torch.float64)
    rotated = scaled(scaling, factor, dim=2 * half, base=base)(x, torch.arange(7, 7 + time))
    how = {"start": 7, "base": base, "scaling": scaling, "trained": TRAINED}
    assert_same(rotated, reference.rotate(x, factor=factor, **how), within=5e-5)
    linear = reference.rotate(x, factor=factor, **how | {"scaling": "linear" if scaling != "linear" else None})
    assert_differ(rotated, linear, by=1e-2, what="scaled in another way")


@each_scaling
def test_scaled_rotation_is_not_the_reference_with_another_setting(scaling: str) -> None:
    x, positions = vectors(1, 2, 300, DIM, dtype=torch.float64), torch.arange(300)
    rotated = scaled(scaling)(x, positions)
    right = {"base": BASE, "scaling": scaling, "factor": 4.0, "trained": TRAINED}
    assert_same(rotated, reference.rotate(x, **right), within=5e-4)
    wrong = [
        {"factor": 5.0},
        {"base": 400.0},
        *({"scaling": other} for other in {None, "linear", "ntk", "yarn"} - {scaling}),
    ]
    for change in [*wrong, *([{"trained": TRAINED / 4}] if scaling == "yarn" else [])]:
        assert_differ(rotated, reference.rotate(x, **right | change), by=0.1, what=str(change))


def turns(scaling: str | None, factor: float = 4.0) -> list[list[float]]:
    """What the pairs turn from one position to the next: in the reference, and here."""
    slowly = [
        reference.turn(i, DIM, base=BASE, scaling=scaling, factor=factor, trained=TRAINED) for i in range(DIM // 2)
    ]
    return [slowly, scaled(scaling, factor if scaling else 1.0).frequencies().tolist()]


def test_without_scaling_pairs_turn_as_the_paper_says() -> None:
    for pairs in turns(None):
        assert (
            pairs[0] == 1 and pairs[1] == pytest.approx(500 ** (-1 / 8)) and pairs[7] == pytest.approx(500 ** (-7 / 8))
        )


def test_linear_scaling_squeezes_positions() -> None:
    for plain, pairs in zip(turns(None), turns("linear"), strict=True):
        assert [4 * pair for pair in pairs] == pytest.approx(plain)
    x, positions = vectors(1, 2, 50, DIM), torch.arange(50)
    assert_same(scaled("linear")(x, 4 * positions), scaled(None, 1.0)(x, positions), within=1e-4)
    assert_differ(scaled("linear")(x, positions), scaled(None, 1.0)(x, positions), by=0.1, what="not squeezed")


def test_ntk_scaling_slows_the_slowest_pair_alone_by_the_factor() -> None:
    """A base of 500 * 4 ** (16 / 14): so the exponent 14 / 16 of the last pair makes the whole factor of it."""
    for plain, pairs in zip(turns(None), turns("ntk"), strict=True):
        slower = [a / b for a, b in zip(plain, pairs, strict=True)]
        assert slower == pytest.approx([4 ** (i / 7) for i in range(8)])
    assert scaled("ntk").base == pytest.approx(500 * 4 ** (16 / 14))
    assert ntk_base(2, 500.0, 4.0) == 500.0  # the only pair is the fastest


def test_yarn_leaves_fast_pairs_and_squeezes_slow_ones() -> None:
    """Fast is more than 32 turns in the trained length, slow less than one."""
    for plain, pairs in zip(turns(None), turns("yarn"), strict=True):
        in_training = [TRAINED * pair / (2 * math.pi) for pair in plain]
        slower = [a / b for a, b in zip(plain, pairs, strict=True)]
        assert in_training[0] > 32 and in_training[-1] < 1
        assert slower == sorted(slower)
        for often, factor in zip(in_training, slower, strict=True):
            if often > 32:
                assert factor == pytest.approx(1)
            elif often < 1:
                assert factor == pytest.approx(4)
        assert sum(1.01 < factor < 3.99 for factor in slower) >= 3, "nothing lies between"


@pytest.mark.parametrize("factor", [2.0, 4.0, 32.0])
def test_yarn_sharpens_attention_by_the_logarithm_of_the_factor(factor: float) -> None:
    """Queries and keys grow by 1 + ln(factor) / 10 each (Peng et al. 2023), scores by its square."""
    q, k, place = vectors(1, 1, 9, DIM), vectors(1, 1, 9, DIM), torch.arange(9)
    longer = 1 + math.log(factor) / 10
    rope = scaled("yarn", factor)
    assert_same(rope(q, place).norm(dim=-1), longer * q.norm(dim=-1), within=1e-5)
    met, plain = ((a * b).sum(-1) for a, b in ((rope(q, place), rope(k, place)), (q, k)))
    assert_same(met, longer**2 * plain, within=1e-4)
    assert_differ(met, longer * plain, by=1e-2, what="once, not for both")
    for other in ("linear", "ntk"):
        assert_same(scaled(other, factor)(q, place).norm(dim=-1), q.norm(dim=-1), within=1e-5)


@each_scaling
def test_a_scaled_query_and_key_still_meet_at_an_angle_of_their_distance(scaling: str) -> None:
    rope, q, k = scaled(scaling), vectors(1, 1, 1, DIM), vectors(1, 1, 1, DIM)

    def score(q_position: int, k_position: int) -> Tensor:
        return (rope(q, torch.tensor([q_position])) * rope(k, torch.tensor([k_position]))).sum()

    for shift in (1, 10, 1000):
        assert_same(score(7 + shift, 4 + shift), score(7, 4), within=2e-3)
        assert_differ(score(7 + shift, 4), score(7, 4), by=1e-2, what=f"{shift} further apart")


@each_scaling
def test_a_scaled_rope_says_so(scaling: str) -> None:
    assert str(scaled(scaling)).startswith("RotaryEmbedding(dim=16, max_seq_len=1024, base=")
    assert f"scaling={scaling}, factor=4" in str(scaled(scaling)) and "scaling" not in str(scaled(None, 1.0))
