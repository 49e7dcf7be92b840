"""Perplexity and bits a byte, compared with a plain loop over transformers' model and with arithmetic by hand."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from gpt2lab.config import DataConfig
from gpt2lab.data.prepare import prepare
from gpt2lab.data.sources import Document
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.evaluate.perplexity import (
    PASSAGE,
    Passages,
    Perplexity,
    document_passages,
    held_out_passages,
    perplexity,
    unigram_perplexity,
)
from gpt2lab.evaluate.scoring import token_losses
from gpt2lab.evaluate.tasks import TASKS, evaluate
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import hf

STORY = "The cat sat on the mat. The cat's hat is the cat's.\n\nÜber allem: isn't it?  Yes: 1, 22, 333!\n" * 2
BYTES = Tokenizer.bytes()
DOCUMENTS = [Document("a", STORY), Document("b", "ends\n")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2, GPT2LMHeadModel]:
    """The same weights as our model and as theirs."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        HFConfig(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.eval().save_pretrained(folder)
    BYTES.save(folder)
    return hf.read(folder).model, theirs


@torch.inference_mode()
def their_perplexity(theirs: GPT2LMHeadModel, token_ids: np.ndarray, seq_len: int, stride: int) -> float:
    """The loop of transformers' guide to perplexity, with windows that hold seq_len tokens and the one after them."""
    nll, seen = 0.0, 1
    for begin in range(0, len(token_ids) - 1, stride):
        window = torch.from_numpy(token_ids[begin : begin + seq_len + 1]).long()
        fresh = begin + len(window) - seen
        if fresh > 0:
            losses = F.cross_entropy(theirs(window[None, :-1]).logits[0], window[1:], reduction="none")
            nll, seen = nll + losses[-fresh:].double().sum().item(), seen + fresh
    assert seen == len(token_ids)
    return math.exp(nll / (len(token_ids) - 1))


@pytest.mark.parametrize(("seq_len", "stride"), [(32, 32), (32, 8), (64, 64), (50, 1)])
def test_perplexity_is_theirs(pair: tuple[GPT2, GPT2LMHeadModel], seq_len: int, stride: int) -> None:
    ours, theirs = pair
    text = document_passages(DOCUMENTS, BYTES)
    token_ids, num_bytes = text.token_ids, text.bytes
    found = perplexity(ours, text, seq_len, stride)
    assert found.perplexity == pytest.approx(their_perplexity(theirs, token_ids, seq_len, stride), rel=1e-4)
    assert found.perplexity != pytest.approx(their_perplexity(theirs, token_ids, seq_len - 1, stride), rel=1e-3)
    assert found.tokens == len(token_ids) - 1 == num_bytes + 1
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * found.tokens / num_bytes)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(pair: tuple[GPT2, GPT2LMHeadModel]) -> None:
    model = GPT2.from_config(pair[0].config)
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    text = document_passages(DOCUMENTS, BYTES)
    assert perplexity(model, text, 32).perplexity == pytest.approx(257, rel=1e-6)
    assert perplexity(pair[0], text, 32).perplexity > 300


def test_bits_a_byte_by_hand() -> None:
    one_bit, two_bits = Perplexity.of(np.full(10, math.log(2)), 5), Perplexity.of(np.full(10, math.log(4)), 10)
    assert (one_bit.loss, one_bit.perplexity, one_bit.bits_per_byte) == pytest.approx((math.log(2), 2, 2))
    assert (two_bits.loss, two_bits.perplexity, two_bits.bits_per_byte) == pytest.approx((math.log(4), 4, 2))
    assert (one_bit.tokens, one_bit.bytes, two_bits.bytes) == (10, 5, 10)


def test_the_mean_is_over_tokens_and_a_hopeless_model_does_not_overflow() -> None:
    assert Perplexity.of(np.array([1.0, 2.0, 6.0]), 3).perplexity == pytest.approx(math.exp(3))
    assert math.isfinite(Perplexity.of(np.array([1e6]), 1).perplexity)


# --- What is scored ---------------------------------------------------------------------------------------------------


def test_each_document_begins_with_a_separator() -> None:
    text = document_passages([Document("a", "é"), Document("b", "xy")], BYTES)
    assert text.token_ids.tolist() == [256, *"é".encode(), 256, *b"xy"] and text.bytes == 4 and text.scored.all()


def test_shards_are_cut_at_the_limit_and_their_bytes_in_proportion(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name, text in (("a", "abcdefghi"), ("b", "é" * 5), ("v", "held out")):
        (tmp_path / "text" / f"{name}.txt").write_text(text)
    config = DataConfig(source=f"{tmp_path}/text/[ab].txt", validation=f"{tmp_path}/text/v.txt")
    train = prepare(config, BYTES, folder=tmp_path / "p").train
    text = held_out_passages(train, BYTES, None)
    assert text.token_ids.tolist() == [256, *b"abcdefghi", 256, *"ééééé".encode(), 256] and text.bytes == 19
    text = held_out_passages(train, BYTES, 7)
    assert text.token_ids.tolist() == [256, *b"abcdefg"] and text.bytes == round(19 * 7 / 21)
    assert held_out_passages(train, BYTES, 10**6).bytes == 19


class Tokens:
    """A training text in memory."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= len(self.ids)
        return self.ids[start : start + length]


class Numbered(Tokens):
    """A text in which every id is its own place, a prompt in the second hundred."""

    bytes = 30_000

    def __init__(self) -> None:
        super().__init__(np.arange(20_000))

    def scored(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length] // 100 != 1


def test_a_part_of_a_text_is_passages_from_all_over_it() -> None:
    limit = 3 * PASSAGE - 2
    text = held_out_passages(Numbered(), BYTES, limit)
    passages = np.split(text.token_ids, np.cumsum(text.lengths)[:-1])
    assert [passage[1] for passage in passages] == [0, (20_000 - limit) // 2 + limit // 3, 20_000 - PASSAGE]
    assert passages[0][0] == BYTES.end_of_text and all((np.diff(passage[1:]) == 1).all() for passage in passages)
    assert all(passage[0] == passage[1] - 1 for passage in passages[1:])
    counted = np.append(False, text.scored)
    assert not counted[np.cumsum((0, *text.lengths))[:-1]].any() and counted.sum() == limit - 100
    assert text.bytes == round(30_000 * (limit - 100) / 20_000)


def test_passages_are_scored_each_alone(pair: tuple[GPT2, GPT2LMHeadModel]) -> None:
    ids = np.random.default_rng(0).integers(256, size=165)
    lengths = (40, 100, 25)
    ours = token_losses(pair[0], ids, 32, 8, lengths=lengths)
    apart = [np.append(0, token_losses(pair[0], part, 32, 8)) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    assert ours == pytest.approx(np.concatenate(apart)[1:], abs=1e-5)
    assert token_losses(pair[0], ids, 32, 8) != pytest.approx(ours, abs=1e-2)


# --- Unigrams ---------------------------------------------------------------------------------------------------------


def whole(token_ids: np.ndarray) -> Passages:
    """Ids as one passage."""
    return Passages(token_ids, (len(token_ids),), np.ones(len(token_ids) - 1, bool), 1)


def slow_unigram_perplexity(train: list[int], token_ids: list[int], vocab_size: int) -> float:
    counts = Counter(train)
    total = len(train) + vocab_size
    return math.exp(-sum(math.log((counts[i] + 1) / total) for i in token_ids[1:]) / (len(token_ids) - 1))


@pytest.mark.parametrize("num_tokens", [0, 1, 1000, (1 << 22) + 5])
def test_unigrams_by_hand(num_tokens: int) -> None:
    random = np.random.default_rng(0)
    train = np.append(random.integers(9, size=max(0, num_tokens - 1)), [3] * min(1, num_tokens))
    token_ids = random.integers(12, size=100)
    ours = unigram_perplexity(Tokens(train.astype(np.int64)), whole(token_ids), 12)
    assert ours == pytest.approx(slow_unigram_perplexity(train.tolist(), token_ids.tolist(), 12))


def test_unigrams_do_not_score_the_first_token_and_know_the_text_they_read() -> None:
    train, ids = Tokens(np.array([0, 0, 0, 1])), np.array([0, 1, 0, 0])
    assert unigram_perplexity(train, whole(np.append(1, ids)), 2) == unigram_perplexity(
        train, whole(np.append(0, ids)), 2
    )
    assert unigram_perplexity(train, whole(np.append(0, 1 - ids)), 2) > unigram_perplexity(
        train, whole(np.append(0, ids)), 2
    )


# --- The tasks of `gpt2lab eval` --------------------------------------------------------------------------------------


def test_the_task_scores_a_text_file_whole(pair: tuple[GPT2, GPT2LMHeadModel], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(STORY, encoding="utf-8")
    found = evaluate("none", pair[0], BYTES, ["perplexity"], data=str(tmp_path / "text.txt"), stride=16)
    token_ids = np.array([256, *STORY.encode()])
    assert found["perplexity"]["perplexity"] == pytest.approx(their_perplexity(pair[1], token_ids, 64, 16), rel=1e-4)
    assert found["perplexity"]["bytes"] == len(STORY.encode())
    without_stride = evaluate("none", pair[0], BYTES, ["perplexity"], data=str(tmp_path / "text.txt"))
    assert without_stride["perplexity"]["perplexity"] == pytest.approx(
        their_perplexity(pair[1], token_ids, 64, 64), rel=1e-4
    )
    assert without_stride["perplexity"]["perplexity"] != pytest.approx(found["perplexity"]["perplexity"], rel=1e-3)
    assert set(found["perplexity"]) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}


def test_what_cannot_be_evaluated_is_refused(pair: tuple[GPT2, GPT2LMHeadModel], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(STORY, encoding="utf-8")
    text = str(tmp_path / "text.txt")
    for stride in (0, -1, 65):
        with pytest.raises(ConfigError, match=rf"--stride\): {stride}, with a context of 64. Fix: 1 to 64"):
            evaluate("none", pair[0], BYTES, ["perplexity"], data=text, stride=stride)
    with pytest.raises(ConfigError, match=f"no such task .*'perplexty'.*{next(iter(TASKS))}"):
        evaluate("none", pair[0], BYTES, ["perplexty"], data=text)
    with pytest.raises(ConfigError, match=r"no held-out text of its own\. Fix: --data=FILE"):
        evaluate("none", pair[0], BYTES, ["perplexity"])
    with pytest.raises(DataError, match="cannot read the text"):
        evaluate("none", pair[0], BYTES, ["perplexity"], data=str(tmp_path / "no.txt"))
