"""Beam search: against all continuations there are, against transformers on the same weights, and against greedy text."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2lab.errors import ConfigError, NumbersError
from gpt2lab.generation.beam import Beam, beam_search
from gpt2lab.model.gpt2 import GPT2
from tests.model.test_parity import VOCAB, from_hf_gpt2, make_hf_gpt2, token_ids
from tests.model.test_variants import SHAPE, VARIANTS, build, each_variant, tokens

PROMPT = tokens(1, 9)[0]
TINY = {"vocab_size": 3, "max_seq_len": 16, "embed_dim": 8, "num_heads": 2, "ff_hidden_dim": 8, "num_layers": 1}


@torch.no_grad()
def log_probability(model: GPT2, prompt: Tensor, continuation: list[int]) -> float:
    """Without a cache, all at once."""
    ids = torch.cat([prompt, torch.tensor(continuation, dtype=torch.int64)])
    scores = model(ids[None, :-1])[0, len(prompt) - 1 :].double().log_softmax(-1)
    return float(scores.gather(-1, ids[len(prompt) :, None]).sum())


def search(model: GPT2, prompt: Tensor, beams: int, steps: int, **options: Any) -> list[Beam]:
    options = {"end_of_text": 0} | options
    return beam_search(model, prompt, num_beams=beams, max_new_tokens=steps, **options)


def continuations(end_of_text: int, vocab_size: int, steps: int) -> list[list[int]]:
    """Every text that ends with the separator, or with the last step; the separator stands in it."""
    return [
        list(text)
        for length in range(1, steps + 1)
        for text in itertools.product(range(vocab_size), repeat=length)
        if end_of_text not in text[:-1] and (length == steps or text[-1] == end_of_text)
    ]


# --- All there are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(4))
def test_with_beams_for_all_it_finds_the_best_there_are(seed: int, length_penalty: float) -> None:
    model, prompt, steps = build(TINY, seed).eval(), torch.tensor([1, 2, 1]), 4
    every = continuations(0, 3, steps)
    sums = {tuple(text): log_probability(model, prompt, text) for text in every}
    ranked = sorted(sums, key=lambda text: sums[text] / len(text) ** length_penalty, reverse=True)
    found = search(model, prompt, len(every), steps, length_penalty=length_penalty, num_return=len(every))
    for beam, text in zip(found, ranked, strict=True):
        assert beam.token_ids == [token for token in text if token != 0]
        assert beam.finish_reason == ("stop" if text[-1] == 0 else "length")
        assert beam.log_probability == pytest.approx(sums[text], abs=1e-5)
        assert beam.score == pytest.approx(sums[text] / len(text) ** length_penalty, abs=1e-5)
    assert sum(map(math.exp, sums.values())) == pytest.approx(1, abs=1e-5)  # they are all there are


def test_one_beam_misses_what_several_find() -> None:
    """Otherwise the reference would say nothing of the search."""
    better = 0
    for seed in range(8):
        model = build(SHAPE, seed).eval()
        [[one], [many]] = (search(model, PROMPT, beams, 6, end_of_text=None) for beams in (1, 16))
        assert many.log_probability >= one.log_probability
        better += many.log_probability > one.log_probability + 0.1
    assert better >= 4


# --- Transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.filterwarnings("ignore")
def test_it_is_transformers(beams: int, length_penalty: float) -> None:
    """Separators are made likely, so that texts end at several lengths."""
    ends, others = set(), 0
    for seed in range(4):
        torch.manual_seed(seed)
        theirs = make_hf_gpt2()
        with torch.no_grad():
            theirs.transformer.wte.weight[0] *= 2
        ours = GPT2(VOCAB, 32, 32, 4, 48, 2).eval()
        ours.load_state_dict(from_hf_gpt2(theirs.state_dict(), 2))
        prompt = token_ids()[0, :8]
        options = {"length_penalty": length_penalty, "num_beams": beams}
        expected = theirs.generate(
            prompt[None], attention_mask=torch.ones(1, 8), do_sample=False, max_new_tokens=12, num_return_sequences=beams,
            eos_token_id=0, pad_token_id=0, output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        found = beam_search(ours, prompt, max_new_tokens=12, end_of_text=0, num_return=beams, **options)
        rows = [row[: row.index(0)] if 0 in row else row for row in expected.sequences[:, 8:].tolist()]
        assert [beam.token_ids for beam in found] == rows
        assert [beam.score for beam in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
        ends |= {len(beam.token_ids) for beam in found}
        wrong = beam_search(
            ours, prompt, max_new_tokens=12, end_of_text=0, num_return=beams,
            num_beams=beams, length_penalty=length_penalty + 3,
        )  # fmt: skip
        others += [beam.score for beam in wrong] != pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
    assert len(ends) > 1 and others > 0


# --- Greedy text, and the cache ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")  # two thirds of the time; other tests here are checked
@each_variant
@torch.no_grad()
def test_one_beam_is_greedy_and_more_are_scored_as_without_a_cache(variant: dict[str, Any]) -> None:
    model = build(variant).eval()
    ids = PROMPT.tolist()
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    [greedy] = search(model, PROMPT, 1, 5, end_of_text=None)
    assert greedy.token_ids == ids[9:] and greedy.finish_reason == "length"
    found = search(model, PROMPT, 3, 5, end_of_text=None, num_return=3)
    assert len({tuple(beam.token_ids) for beam in found}) == 3
    for beam in found:
        assert beam.log_probability == pytest.approx(log_probability(model, PROMPT, beam.token_ids), abs=1e-4)
    swapped = [*found[0].token_ids[:-1], (found[0].token_ids[-1] + 1) % 61]
    assert abs(log_probability(model, PROMPT, swapped) - found[0].log_probability) > 1e-3


@pytest.mark.parametrize("length", [1, 7, 8])
def test_learned_positions_end_the_search(length: int) -> None:
    model = build(SHAPE | {"max_seq_len": 8}).eval()
    for beam in search(model, PROMPT[:length], 3, 99, end_of_text=None, num_return=3):
        assert len(beam.token_ids) == 8 - length + 1 and beam.finish_reason == "length"


def test_rope_goes_on_beyond_the_trained_length() -> None:
    model = build(SHAPE | {"max_seq_len": 8, "position": "rope", "windows": [3]}).eval()
    [beam] = search(model, PROMPT, 3, 60, end_of_text=None)
    assert len(beam.token_ids) == 60


# --- What cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beams": 0}, "--num-beams"),
        ({"steps": 0}, "--max-new-tokens"),
        ({"num_return": 3}, "--num-return"),
        ({"length_penalty": math.nan}, "--length-penalty"),
        ({"length_penalty": 11}, "--length-penalty"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        search(build(SHAPE), PROMPT, **{"beams": 2, "steps": 4} | options)


def test_there_are_no_more_texts_than_there_are() -> None:
    assert len(search(build(TINY).eval(), torch.tensor([1]), 9, 1, num_return=9)) == 3


def test_numbers_that_went_bad_end_it() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    with torch.no_grad():
        model.final_norm.weight[0] = math.nan
    with pytest.raises(NumbersError, match="numbers went bad"):
        search(model, PROMPT, 2, 4)
