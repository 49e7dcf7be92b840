"""The cache against a plain Python list, under any order of `append` and `truncate`."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.model.cache import ROLLBACK, KVCache, WindowCache
from gpt2lab.model.gpt2 import GPT2

CAPACITY = 300
Step = tuple[str, int]


def follow(cache: KVCache, steps: list[Step]) -> None:
    """Do the same to the cache and to a list, and compare all that a query may need, at each step.

    Every key is a number of its own, so a stale or a moved one shows. Steps that the cache may refuse are not taken.
    """
    truth: list[float] = []
    peak = fresh = 0
    for verb, count in steps:
        if verb == "append":
            count = min(count, cache.capacity - len(truth))
            new = [float(fresh + i) for i in range(count)]
            fresh += count
            if not new:
                continue
            first_query = len(truth)
            truth += new
            peak = max(peak, len(truth))
            k = torch.tensor(new).view(1, 1, -1, 1).expand(2, 3, -1, 2)
            keys, values, start = cache.append(k, -k)
            assert start <= max(0, first_query - (cache.window or first_query + 1) + 1), "a key in the window is gone"
            assert keys.shape == (2, 3, len(truth) - start, 2) and (keys == keys[:1, :1, :, :1]).all()
            assert keys[0, 0, :, 0].tolist() == truth[start:], "not the keys that were put in"
            assert torch.equal(values, -keys), "not the values that were put in"
        else:
            length = max(0, len(truth) - count)
            if cache.window is not None:
                length = max(length, peak - ROLLBACK)
            cache.truncate(length)
            del truth[length:]
        assert cache.length == len(truth)


steps = st.lists(st.tuples(st.sampled_from(["append", "append", "truncate"]), st.integers(1, 90)), max_size=20)


def new_cache(window: int | None, cache_class: type[KVCache] | None = None, capacity: int = CAPACITY) -> KVCache:
    usual = KVCache if window is None else WindowCache
    return (cache_class or usual)(2, 3, 2, capacity, window=window)


@settings(max_examples=300)
@given(window=st.none() | st.integers(1, 100), capacity=st.integers(1, CAPACITY), steps=steps)
def test_a_cache_is_a_list(window: int | None, capacity: int, steps: list[Step]) -> None:
    follow(new_cache(window, capacity=capacity), steps)


def one_by_one(seed: int = 0) -> list[Step]:
    """Decoding with drafts: up to ROLLBACK tokens are appended, one at a time or at once, and some are taken back."""
    draw, steps = random.Random(seed), []
    for _ in range(60):
        count = draw.randint(1, ROLLBACK)
        steps += [("append", 1)] * count if draw.random() < 0.5 else [("append", count)]
        steps += [("truncate", draw.randint(0, count))]
    return steps


def all_taken_back(count: int) -> list[Step]:
    """Taking back the most that can be, `count` tokens after the first 60: sooner or later just after the buffer moved."""
    return [("append", 60), *[("append", 1)] * count, ("truncate", ROLLBACK), ("append", 1)]


@pytest.mark.parametrize("window", [None, 1, 2, 31, 32, 33, 64, 100])
def test_a_cache_is_a_list_while_drafts_are_taken_back(window: int | None) -> None:
    cache = new_cache(window)
    follow(cache, one_by_one())
    assert (cache.start > 0) == (window is not None), "the buffer has moved just where there is a window"


@pytest.mark.parametrize("window", [1, 8, 30])
def test_a_windowed_cache_can_take_back_what_it_promises_at_any_moment(window: int) -> None:
    moved = set()
    for count in range(80):
        cache = new_cache(window)
        follow(cache, all_taken_back(count))
        moved.add(cache.start)
    assert len(moved) > 2, "the buffer should have moved more than once"


class ForgetsToRollBack(WindowCache):
    def truncate(self, length: int) -> None:
        pass


class KeepsTooFew(WindowCache):
    @property
    def reach(self) -> int:
        return super().reach - 2


class KeepsTheWrongEnd(WindowCache):
    def make_room(self, time: int) -> None:
        before, first = self.start, self.keys.read(self.reach, torch.float32).clone()
        super().make_room(time)
        if self.start > before:
            self.keys.write(0, first)


class MiscountsItsStart(WindowCache):
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        keys, values, start = super().append(k, v)
        return keys, values, start + (start > 0)


class MixesUpValues(WindowCache):
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        return super().append(k, k)


FAULTY = [ForgetsToRollBack, KeepsTooFew, KeepsTheWrongEnd, MiscountsItsStart, MixesUpValues]


@pytest.mark.parametrize("faulty", FAULTY)
def test_the_comparison_with_a_list_can_fail(faulty: type[KVCache]) -> None:
    def follow_all() -> None:
        for steps in (one_by_one(), *map(all_taken_back, range(80))):
            follow(new_cache(8, faulty), steps)

    with pytest.raises((AssertionError, ValueError)) as caught:
        follow_all()
    print(f"{faulty.__name__}: {caught.value}")


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    cache, many = new_cache(8), torch.randn(2, 3, CAPACITY, 2)
    cache.append(many[:, :, :200], many[:, :, :200])
    start, keys = cache.start, cache.keys.read(40, torch.float32).clone()
    assert start == 200 - (8 - 1) - ROLLBACK
    with pytest.raises(ValueError, match="the cache holds 300 tokens; 301 do not fit"):
        cache.append(many[:, :, :101], many[:, :, :101])
    for length in (201, -1, 200 - ROLLBACK - 1, 0):
        with pytest.raises(ValueError, match=f"cannot roll back to {length} tokens: the cache holds {start} to 200"):
            cache.truncate(length)
    assert (cache.start, cache.length) == (start, 200) and torch.equal(cache.keys.read(40, torch.float32), keys)
    cache.truncate(200 - ROLLBACK)
    assert cache.length == 200 - ROLLBACK


def test_a_cache_without_a_window_can_be_emptied() -> None:
    cache, many = new_cache(None), torch.randn(2, 3, CAPACITY, 2)
    cache.append(many, many)
    cache.truncate(0)
    keys, _, start = cache.append(many[:, :, :5], many[:, :, :5])
    assert torch.equal(keys, many[:, :, :5]) and start == 0 and cache.length == 5


@pytest.mark.parametrize("window", [1, 8, 100])
def test_memory_of_a_windowed_cache_is_bounded_by_its_window(window: int) -> None:
    a_token = 2 * 2 * 3 * 2 * 4  # keys and values of 2 texts, 3 heads, 2 numbers of 4 bytes
    assert new_cache(window, capacity=10_000).nbytes == new_cache(window, capacity=10**6).nbytes
    assert new_cache(window, capacity=10_000).nbytes <= (window + 2 * ROLLBACK) * a_token
    assert new_cache(None, capacity=10_000).nbytes == 10_000 * a_token
    assert new_cache(window, capacity=5).nbytes == new_cache(None, capacity=5).nbytes == 5 * a_token


def test_the_caches_of_a_model_are_those_of_its_layers() -> None:
    model = GPT2(61, 500, 32, 4, 48, 3, num_kv_heads=2, windows=[8, None, 100])
    cache = model.new_cache(2, 500)
    assert [layer.window for layer in cache] == [8, None, 100]
    assert [layer.keys.shape for layer in cache] == [(2, 2, slots, 8) for slots in (8 + 64, 500, 100 + 64)]
    assert cache.nbytes == sum(layer.nbytes for layer in cache) == 2 * 2 * 2 * 8 * 4 * (72 + 500 + 164)
    assert model.new_cache(2, 500, dtype=torch.bfloat16).nbytes == cache.nbytes // 2
    with torch.no_grad():
        model(torch.zeros(2, 40, dtype=torch.long), cache=cache)
    assert cache.length == 40 and [layer.length for layer in cache] == [40, 40, 40]
    cache.truncate(15)
    assert cache.length == 15 and [layer.length for layer in cache] == [15, 15, 15]
    assert model.double().new_cache(2, 500).nbytes == cache.nbytes * 2


def test_a_refused_rollback_changes_no_layer() -> None:
    model = GPT2(61, 256, 32, 4, 48, 2, windows=[None, 5])
    cache = model.new_cache(1, 256)
    with torch.no_grad():
        model(torch.zeros(1, 200, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="cannot roll back to 100"):
        cache.truncate(100)
    assert [layer.length for layer in cache] == [200, 200]
    cache.truncate(200 - ROLLBACK)
    assert [layer.length for layer in cache] == [200 - ROLLBACK] * 2


def test_another_models_cache_or_batch_is_refused() -> None:
    model, shallow = GPT2(61, 64, 32, 4, 48, 3), GPT2(61, 64, 32, 4, 48, 2)
    token_ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="shorter"):
        model(token_ids, cache=shallow.new_cache(1, 64))
    with pytest.raises(ValueError, match="a batch of 1 does not go on with a cache of 3"):
        model(token_ids, cache=model.new_cache(3, 64))


def test_a_cache_may_be_kept_in_fewer_bits() -> None:
    model = GPT2(61, 64, 32, 4, 48, 2).eval()
    token_ids = torch.arange(20)[None]
    with torch.no_grad():
        whole, cache = model(token_ids), model.new_cache(1, 64, dtype=torch.bfloat16)
        coarse = torch.cat([model(part, cache=cache) for part in token_ids.split(10, dim=1)], dim=1)
    assert 0 < (coarse - whole).abs().max() < 0.02 and cache.nbytes * 2 == model.new_cache(1, 64).nbytes
