"""Attention by itself: the mask rule, every way `attend` applies it, and what a window saves."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2lab.config import GPT2Config
from gpt2lab.model.attend import SMALLEST_BLOCK, attend, visible
from gpt2lab.model.attention import GroupQueryAttention
from tests import reference
from tests.reference import assert_differ, assert_same, planted_faults

T, F_ = True, False
FAULTS = planted_faults(GPT2Config(embed_dim=32, num_heads=4, num_kv_heads=2, windows=(3,)))


def heads(batch: int, count: int, time: int, dim: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, count, time, dim, dtype=dtype)


# --- The rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        (None, [[T, F_, F_, F_], [T, T, F_, F_], [T, T, T, F_], [T, T, T, T]]),
        (1, [[T, F_, F_, F_], [F_, T, F_, F_], [F_, F_, T, F_], [F_, F_, F_, T]]),
        (2, [[T, F_, F_, F_], [T, T, F_, F_], [F_, T, T, F_], [F_, F_, T, T]]),
    ],
)
def test_a_window_counts_the_token_itself(window: int | None, seen: list[list[bool]]) -> None:
    assert visible(torch.arange(4), torch.arange(4), window).tolist() == seen


def test_only_positions_decide_who_sees_whom() -> None:
    assert visible(torch.tensor([5]), torch.arange(3, 8), 2).tolist() == [[F_, T, T, F_, F_]]
    assert visible(torch.tensor([5]), torch.arange(3, 8)).tolist() == [[T, T, T, F_, F_]]


def test_window_1_returns_the_token_s_own_value() -> None:
    q, k, v = (heads(2, 3, 7) for _ in range(3))
    assert_same(attend(q, k, v, window=1), v, within=1e-15)
    assert_differ(attend(q, k, v, window=2), v, by=0.1, what="window 2")


# --- attend is the reference ------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, int | None]:
    """Queries at the end of the keys, as training (no past), prefill, chunks and decoding (one query) make them."""
    return {
        "batch": draw(st.integers(1, 2)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 3)),
        "dim": draw(st.integers(1, 5)),
        "time": draw(st.integers(1, 9)),
        "past": draw(st.integers(0, 9)),
        "k_start": draw(st.integers(0, 9)),
        "window": draw(st.none() | st.integers(1, 12)),
    }


@given(cases())
def test_attend_is_the_reference(case: dict[str, Any]) -> None:
    q = heads(case["batch"], case["kv_heads"] * case["group"], case["time"], case["dim"])
    k, v = (heads(case["batch"], case["kv_heads"], case["past"] + case["time"], case["dim"]) for _ in range(2))
    where = {"q_start": case["k_start"] + case["past"], "k_start": case["k_start"], "window": case["window"]}
    assert_same(attend(q, k, v, **where), reference.attention(q, k, v, **where), within=1e-13)


PATHS = {"training": (0, 9), "chunk": (6, 5), "decoding": (9, 1)}
"""Tokens read before, and queries."""


@pytest.mark.parametrize(("past", "time"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("fault", FAULTS)
def test_attend_is_not_the_reference_with_a_planted_fault(past: int, time: int, fault: str) -> None:
    q, k, v = heads(2, 4, time), heads(2, 2, past + time), heads(2, 2, past + time)
    if fault == "mask on the wrong side":
        k, v = (torch.cat([x, heads(2, 2, 3)], dim=2) for x in (k, v))  # so that each query has a wrong side
    seen = k[:, :, : past + time], v[:, :, : past + time]
    ours = attend(q, *seen, q_start=past, window=3)
    assert_same(ours, reference.attention(q, k, v, q_start=past, window=3), within=1e-13)
    wrong = reference.attention(q, k, v, q_start=past, window=3, rules=FAULTS[fault])
    assert_differ(ours, wrong, by=0.1, what=fault)


def test_keys_out_of_reach_are_not_read() -> None:
    """Not even with a weight of 0: 0 * NaN is NaN."""
    q, k, v = heads(1, 2, 1), heads(1, 2, 10), heads(1, 2, 10)
    k[:, :, :7], v[:, :, :7] = torch.nan, torch.nan
    assert attend(q, k, v, q_start=9, window=3).isfinite().all()
    assert not attend(q, k, v, q_start=9, window=4).isfinite().any()


# --- Block by block ---------------------------------------------------------------------------------------------------

LENGTHS_AND_WINDOWS = [(129, 1), (129, 64), (150, 5), (192, 64), (193, 63), (200, 2), (257, 64), (261, 100), (300, 70)]


def attend_with_a_mask(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """The full square, masked: what the blocks avoid."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = visible(torch.arange(q.shape[2]), torch.arange(k.shape[2]), window)
    return F.scaled_dot_product_attention(q, k, v, mask)


def with_gradients(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, window: int, direction: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, window=window)
    return out, *torch.autograd.grad(out, leaves, direction)


@pytest.mark.parametrize(("time", "window"), LENGTHS_AND_WINDOWS)
@pytest.mark.parametrize("group", [1, 3])
def test_blocks_are_the_masked_square(time: int, window: int, group: int, in_blocks: list[int]) -> None:
    q, k, v = heads(2, 2 * group, time), heads(2, 2, time), heads(2, 2, time)
    direction = torch.randn_like(q)
    ours = with_gradients(attend, q, k, v, window, direction)
    assert in_blocks == [window]
    truth = with_gradients(attend_with_a_mask, q, k, v, window, direction)
    wrong = with_gradients(attend_with_a_mask, q, k, v, window + 1, direction)
    for name, ours_, truth_, wrong_ in zip(["out", "dq", "dk", "dv"], ours, truth, wrong, strict=True):
        assert_same(ours_, truth_, within=1e-12, what=name)
        in_blocks_only = slice(-time // 3, None)
        what = f"{name}, window one too wide"
        assert_differ(ours_[:, :, in_blocks_only], wrong_[:, :, in_blocks_only], by=1e-2, what=what)


@given(
    time=st.integers(2 * SMALLEST_BLOCK + 1, 5 * SMALLEST_BLOCK), window=st.integers(1, 2 * SMALLEST_BLOCK),
    kv_heads=st.integers(1, 2), group=st.integers(1, 2), start=st.integers(0, 9),
)  # fmt: skip
def test_blocks_are_the_masked_square_at_any_length(
    time: int, window: int, kv_heads: int, group: int, start: int
) -> None:
    q, k, v = heads(1, kv_heads * group, time, 2), heads(1, kv_heads, time, 2), heads(1, kv_heads, time, 2)
    ours = attend(q, k, v, q_start=start, k_start=start, window=window)
    assert_same(ours, attend_with_a_mask(q, k, v, window=window), within=1e-12)


def test_blocks_are_the_reference() -> None:
    q, k, v = heads(1, 4, 150), heads(1, 2, 150), heads(1, 2, 150)
    ours = attend(q, k, v, window=6)
    assert_same(ours, reference.attention(q, k, v, window=6), within=1e-13)
    for fault, rules in FAULTS.items():
        wrong = reference.attention(q, k, v, window=6, rules=rules)
        assert_differ(ours[:, :, SMALLEST_BLOCK:], wrong[:, :, SMALLEST_BLOCK:], by=0.1, what=fault)


# --- What a window saves: counted, not timed --------------------------------------------------------------------------


class Scores(TorchFunctionMode):
    """Counts the scores that attention is asked for: queries times keys."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            self.count += q.shape[:-1].numel() * k.shape[-2]
        return func(*args, **kwargs or {})


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that is made, masks and intermediate results included, views of others not."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given, made = (
            {x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)} for tree in ((args, kwargs), out)
        )
        self.nbytes = max([self.nbytes, *(storage.nbytes() for storage in made - given)])
        return out


def cost(time: int, past: int = 0, *, function: Callable[..., Tensor] = attend, **how: Any) -> tuple[int, int]:
    """Scores that are computed, and bytes of the largest tensor that is made, for 2 heads of 4 float64 on 1 key head."""
    q, k, v = heads(1, 2, time), heads(1, 1, past + time), heads(1, 1, past + time)
    with Scores() as scores, LargestTensor() as largest:
        function(q, k, v, **how)
    return scores.count, largest.nbytes


@pytest.mark.parametrize("past", [1, 49, 300])
def test_a_chunk_after_others_pays_no_square_either(past: int) -> None:
    window, time = 50, 1280
    scores, largest = cost(time, past, q_start=past, window=window)
    blocks, alone = cost(time, window=window)
    assert scores <= blocks + 2 * SMALLEST_BLOCK * window and largest <= 1.2 * alone
    assert cost(time, past, q_start=past)[0] > 4 * scores  # without a window it is the square


@pytest.mark.parametrize("window", [1, 50, 64, 100])
def test_a_window_pays_for_two_blocks_a_query_and_not_for_the_square(window: int) -> None:
    block = max(window, SMALLEST_BLOCK)
    time = 20 * block
    scores, nbytes = cost(time, window=window)
    assert scores <= 2 * time * 2 * block
    assert nbytes <= 2 * time * 2 * 4 * 8  # each key stands in two blocks
    twice_scores, twice_nbytes = cost(2 * time, window=window)
    assert twice_scores <= 2.1 * scores and twice_nbytes <= 2.1 * nbytes
    square_scores, square_nbytes = cost(time, function=attend_with_a_mask, window=window)
    saved = f"1/{square_scores / scores:.0f} of the scores, 1/{square_nbytes / nbytes:.0f} of the bytes"
    print(f"window {window} of {time}: {saved}")
    assert square_scores == cost(time)[0] == 2 * time**2 > 9 * scores and square_nbytes > 9 * nbytes


def test_one_new_token_pays_for_its_window_only() -> None:
    assert cost(1, past=500, q_start=500, window=8) == cost(1, past=5000, q_start=5000, window=8)
    assert cost(1, past=500, q_start=500, window=8)[0] == 2 * 8 < cost(1, past=500, q_start=500)[0] == 2 * 501


# --- The module -------------------------------------------------------------------------------------------------------


def module(num_kv_heads: int, **changes: Any) -> GroupQueryAttention:
    attn = GroupQueryAttention(32, 4, num_kv_heads, **changes).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attn


@torch.no_grad()
def test_multi_head_attention_is_torch_s() -> None:
    ours, theirs = module(4), nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    x, future = torch.randn(2, 9, 32, dtype=torch.float64), torch.ones(9, 9, dtype=torch.bool).triu(1)

    def torch_s(packed: Tensor, bias: Tensor) -> Tensor:
        theirs.in_proj_weight.copy_(packed)
        theirs.in_proj_bias.copy_(bias)
        theirs.out_proj.load_state_dict(ours.output_proj.state_dict())
        return theirs(x, x, x, attn_mask=future, need_weights=False)[0]

    packed, bias = ours.qkv_proj.weight, ours.qkv_proj.bias
    assert_same(ours(x, torch.arange(9)), torch_s(packed, bias), within=1e-12)
    k_first = torch.cat([packed[32:64], packed[:32], packed[64:]])
    assert_differ(ours(x, torch.arange(9)), torch_s(k_first, bias), by=1e-2, what="queries and keys exchanged")


@torch.no_grad()
def test_grouped_query_attention_is_multi_head_attention_with_shared_keys() -> None:
    grouped, full, x = module(2), module(4), torch.randn(2, 9, 32, dtype=torch.float64)
    assert grouped.num_kv_heads != full.num_kv_heads
    full.output_proj.load_state_dict(grouped.output_proj.state_dict())

    def spread(rows: Tensor, order: list[int]) -> Tensor:
        by_head = rows.unflatten(0, (-1, 8))
        return torch.cat([by_head[:4], by_head[4:6][order], by_head[6:8][order]]).flatten(0, 1)

    for order, same in [([0, 0, 1, 1], True), ([0, 1, 0, 1], False)]:
        full.qkv_proj.weight.copy_(spread(grouped.qkv_proj.weight, order))
        full.qkv_proj.bias.copy_(spread(grouped.qkv_proj.bias, order))
        ours, theirs = grouped(x, torch.arange(9)), full(x, torch.arange(9))
        if same:
            assert_same(ours, theirs, within=1e-12)
        else:
            assert_differ(ours, theirs, by=1e-2, what="heads grouped in turn")


def test_attention_weights_are_dropped_in_training_in_every_path() -> None:
    """Each kept weight is divided by the chance of being kept, so over many draws the mean is what it is without."""
    v = torch.ones(1, 200, 150, 1)
    q = k = torch.zeros_like(v)
    for window, time in itertools.product([None, 5], [3, 150]):
        dropped = attend(q[:, :, :time], k[:, :, :time], v[:, :, :time], window=window, dropout=0.25)
        assert dropped.std() > 0.1 and dropped.mean().item() == pytest.approx(1, abs=0.1)
        assert_same(attend(q[:, :, :time], k[:, :, :time], v[:, :, :time], window=window), v[:, :, :time], within=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((32, 5, 5), "num_heads 5 does not divide embed_dim 32"),
        ((32, 4, 3), "num_kv_heads 3 does not divide num_heads 4"),
    ],
)
def test_heads_that_do_not_divide_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupQueryAttention(*sizes)


def test_the_paths_meet_at_the_length_where_blocks_begin(in_blocks: list[int]) -> None:
    """One token more than two blocks is the first length that is cut; the tokens before it must not notice."""
    q, k, v = heads(1, 2, 129), heads(1, 2, 129), heads(1, 2, 129)
    square = attend(q[:, :, :128], k[:, :, :128], v[:, :, :128], window=7)
    assert in_blocks == []
    assert_same(attend(q, k, v, window=7)[:, :, :128], square, within=1e-13)
    assert in_blocks == [7] and SMALLEST_BLOCK == 64
