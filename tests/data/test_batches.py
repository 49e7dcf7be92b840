"""Which text at which step: every sample once an epoch, in the same order, whoever asks and in what portions."""

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.data.batches import Batches
from gpt2lab.data.samples import Contiguous, epoch_samples
from gpt2lab.errors import DataError
from gpt2lab.model.loss import IGNORE
from gpt2lab.seeds import derive
from tests.reference import assert_differ, assert_same


class Positions:
    """A text in which every token is its own position, so that a sample says where it was cut."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __len__(self) -> int:
        return self.num_tokens

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= self.num_tokens, f"{length} tokens from {start} of {self.num_tokens}"
        return np.arange(start, start + length)

    def scored(self, start: int, length: int) -> np.ndarray:
        return np.ones(length, bool)


def batches(num_tokens: int = 1000, seq_len: int = 8, seed: int = 1, **changes: Any) -> Batches:
    samples = Contiguous(Positions(num_tokens), seq_len, seed)
    return Batches(samples, **{"step_samples": 4, "micro_batch": 4} | changes)


def starts_of(whole: Batches, step: int, micro_step: int | None = None) -> list[int]:
    """Where the samples of a step begin, or those of one call."""
    indices = whole.step_indices(step) if micro_step is None else whole.indices(step, micro_step)
    return [whole.samples.start(index) for index in indices]


def starts(whole: Batches, count: int) -> list[int]:
    """The first `count` samples in the order in which the ranks together learn from them."""
    ranks = [
        Batches(whole.samples, whole.step_samples, whole.micro_batch, rank, whole.world_size)
        for rank in range(whole.world_size)
    ]
    drawn = (
        start
        for step in range(count)
        for micro_step in range(whole.micro_steps)
        for rank in ranks
        if rank.number(micro_step) < rank.passes
        for start in rank(step, micro_step)[0][:, 0].tolist()
    )
    return list(islice(drawn, count))


def test_a_batch_is_a_function_of_its_arguments() -> None:
    first, _ = batches()(3, 0)
    again, _ = batches()(3, 0)
    assert_same(first, again, within=0)
    first.zero_()
    assert_same(batches()(3, 0)[0], again, within=0, what="a batch and one that somebody wrote into")
    for other in (batches(seed=2)(3, 0), batches()(4, 0), batches(num_tokens=2000)(3, 0)):
        assert_differ(other[0], again, by=1, what="another seed, step or text")


def test_the_order_of_asking_does_not_matter() -> None:
    one = batches()
    backwards = [one(step, 0)[0] for step in reversed(range(60))][::-1]
    assert_same(torch.stack(backwards), torch.stack([batches()(step, 0)[0] for step in range(60)]), within=0)
    assert_differ(backwards[0], backwards[1], by=1, what="another step")


def test_targets_are_the_next_tokens() -> None:
    inputs, targets = batches()(0, 0)
    assert inputs.shape == targets.shape == (4, 8) and inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert_same(targets, inputs + 1, within=0)
    assert_same(inputs, inputs[:, :1] + torch.arange(8), within=0)


@st.composite
def splits(draw: st.DrawFn) -> dict[str, int]:
    """A text, a sample, and a way to share a step out over ranks and micro-batches."""
    micro_batch, passes, world_size = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    seq_len = draw(st.integers(1, 9))
    return {
        "num_tokens": draw(st.integers(seq_len + 1, 30 * seq_len + 1)),
        "seq_len": seq_len,
        "micro_batch": micro_batch,
        "world_size": world_size,
        "step_samples": micro_batch * passes,
        "seed": draw(st.integers(0, 2**40)),
    }


@given(splits())
def test_an_epoch_visits_every_sample_once(split: dict[str, int]) -> None:
    whole = batches(**split)
    count, seq_len = whole.samples.per_epoch, split["seq_len"]
    drawn = starts(whole, 3 * count)
    for epoch in (drawn[:count], drawn[count : 2 * count], drawn[2 * count :]):
        in_place = sorted(epoch)
        assert all(b - a == seq_len for a, b in pairwise(in_place)), "samples overlap, or text is left out between them"
        left_over = in_place[0] + split["num_tokens"] - (in_place[-1] + seq_len)
        assert left_over < max(2 * seq_len, 2), f"{left_over} tokens at the ends wait for another epoch"


@given(splits())
def test_the_samples_and_their_order_are_the_same_however_they_are_shared_out(split: dict[str, int]) -> None:
    count = 2 * split["step_samples"] + 1
    shared = starts(batches(**split), count)
    alone = starts(batches(**split | {"world_size": 1, "micro_batch": split["step_samples"]}), count)
    assert shared == alone


def test_the_first_ranks_rows_are_not_the_second_s() -> None:
    split = {"world_size": 2, "micro_batch": 1, "step_samples": 4}
    rows = {
        (rank, micro_step): starts_of(batches(**split, rank=rank), 0, micro_step)[0]
        for rank in (0, 1)
        for micro_step in (0, 1)
    }
    assert len(set(rows.values())) == 4
    assert [rows[place] for place in [(0, 0), (1, 0), (0, 1), (1, 1)]] == starts_of(batches(), 0, 0)
    assert [rows[place] for place in [(0, 0), (0, 1), (1, 0), (1, 1)]] != starts_of(batches(), 0, 0)


@given(splits())
def test_all_ranks_make_equally_many_calls_and_each_pass_is_scored_by_one(split: dict[str, int]) -> None:
    ranks = [batches(**split, rank=rank) for rank in range(split["world_size"])]
    whole = ranks[0]
    assert whole.passes * split["micro_batch"] == split["step_samples"]
    assert len({rank.micro_steps for rank in ranks}) == 1
    assert whole.passes <= whole.micro_steps * len(ranks) < whole.passes + len(ranks)
    numbers = [rank.number(micro_step) for micro_step in range(whole.micro_steps) for rank in ranks]
    assert numbers == list(range(len(numbers))), "numbers go round the ranks"
    for step in (0, 5):
        scored = {}
        for rank in ranks:
            for micro_step in range(rank.micro_steps):
                token_ids, targets = rank(step, micro_step)
                assert_same(token_ids[:, 0], torch.tensor(starts_of(rank, step, micro_step)), within=0)
                if rank.number(micro_step) < rank.passes:
                    scored[rank.number(micro_step)] = token_ids[:, 0].tolist()
                    assert_same(targets, token_ids + 1, within=0)
                else:
                    assert (targets == IGNORE).all() and (token_ids >= 0).all(), "a pass too many scores nothing"
        in_order = [start for number in sorted(scored) for start in scored[number]]
        assert sorted(scored) == list(range(whole.passes))
        assert in_order == starts_of(whole, step) == starts_of(batches(**split | {"world_size": 1}), step)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_inputs_and_targets_share_no_memory(micro_batch: int) -> None:
    """A slice of one row is contiguous: writing into the targets once wrote into the inputs."""
    token_ids, targets = batches(micro_batch=micro_batch)(0, 0)
    before = token_ids.clone()
    targets.fill_(IGNORE)
    assert_same(token_ids, before, within=0)


def test_an_epoch_is_shuffled_and_cut_at_its_own_place() -> None:
    whole = batches(num_tokens=4001, seq_len=40)
    count = whole.samples.per_epoch
    drawn = starts(whole, 5 * count)
    epochs = [drawn[i * count : (i + 1) * count] for i in range(5)]
    assert len({tuple(epoch) for epoch in epochs}) == 5 and all(epoch != sorted(epoch) for epoch in epochs)
    assert len({min(epoch) for epoch in epochs}) > 1, "every epoch cuts the text at the same tokens"


def test_seed_and_epoch_are_not_added_up() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        whole = batches(seed=seed, step_samples=1, micro_batch=1)
        first = number * whole.samples.per_epoch
        return [starts_of(whole, step, 0)[0] for step in range(first, first + whole.samples.per_epoch)]

    assert len({tuple(epoch(*pair)) for pair in [(1, 2), (2, 1), (3, 0), (0, 3)]}) == 4
    assert sorted(np.diff(sorted(epoch(1, 2)))) == sorted(np.diff(sorted(epoch(2, 1))))


def test_the_parts_of_a_seed_are_not_added_up() -> None:
    parts = [
        (7, "order", 1, 2),
        (7, "order", 2, 1),
        (8, "order", 0, 2),
        (7, "order", 3),
        (7, "order"),
        (7, "dropout", 1, 2),
    ]
    assert len({derive(*part) for part in parts}) == len(parts)
    assert derive(*parts[0]) == 9070913188414820133, "runs that were started with another numpy cannot go on"


@pytest.mark.parametrize("seq_len", [1, 2, 8])
def test_a_text_of_one_sample(seq_len: int) -> None:
    whole = batches(num_tokens=seq_len + 1, seq_len=seq_len, world_size=4, micro_batch=1)
    assert whole.samples.per_epoch == 1 and starts(whole, 9) == [0] * 9
    assert_same(whole(5, 0)[1], torch.arange(1, seq_len + 1)[None], within=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8])
def test_a_text_shorter_than_a_sample_is_refused(num_tokens: int) -> None:
    with pytest.raises(
        DataError, match=rf"the training text has {num_tokens} tokens, one sample needs seq_len \+ 1 = 9"
    ):
        batches(num_tokens=num_tokens)
    batches(num_tokens=9)


@pytest.mark.parametrize(("num_tokens", "samples"), [(9, 1), (16, 1), (23, 1), (24, 2), (1000, 124)])
def test_how_many_samples_an_epoch_has(num_tokens: int, samples: int) -> None:
    assert epoch_samples(num_tokens, 8) == batches(num_tokens).samples.per_epoch == samples
