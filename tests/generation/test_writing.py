"""Text from a model: with the cache it is, token for token, what it is without; stops and streams are around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt2lab.errors import ConfigError, DataError, LabError
from gpt2lab.generation import Engine, Request, Sample, Sampler, generate
from gpt2lab.generation.sampling import draw, uniforms
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer
from tests.model.test_variants import SHAPE, VARIANTS, build, each, each_variant, tokens

ALPHABET = "".join(chr(ord("0") + index) for index in range(SHAPE["vocab_size"] - 1))
TOKENIZER = Tokenizer.chars([ALPHABET])
PROMPT = tokens(1, 9)[0] % 60
SAMPLERS = {"greedy": Sampler(0), "sampled": Sampler(1.0, top_k=20, top_p=0.95)}


@torch.no_grad()
def slow_decode(model: GPT2, prompt: Tensor, sample: int, steps: int, sampler: Sampler, seed: int) -> list[int]:
    """The definition: read everything again for each token."""
    ids = prompt.tolist()
    for _ in range(steps):
        logits = model(torch.tensor([ids]))[:, -1]
        number = uniforms(seed, range(sample, sample + 1), len(ids))
        ids.append(int(draw(sampler.probabilities(logits), number)))
    return ids[len(prompt) :]


def fast_decode(model: GPT2, prompt: Tensor, samples: int, steps: int, sampler: Sampler, seed: int) -> list[list[int]]:
    engine = Engine(model)
    texts = engine.submit(Request(prompt.tolist(), steps, sampler, seed), samples)
    while engine.busy:
        engine.step()
    return [text.token_ids for text in texts]


# --- The loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")  # four fifths of the time; other tests here are checked
@each_variant
@pytest.mark.parametrize("how", SAMPLERS)
def test_with_a_cache_it_is_the_text_without(variant: dict[str, Any], how: str) -> None:
    model, sampler = build(variant).eval(), SAMPLERS[how]
    rows = fast_decode(model, PROMPT, 3, 10, sampler, seed=5)
    assert rows == [slow_decode(model, PROMPT, sample, 10, sampler, seed=5) for sample in range(3)]
    # Control: another seed and another sample are other text, unless it is greedy; other weights always are.
    others = [slow_decode(model, PROMPT, 0, 10, sampler, seed=6), rows[1]]
    assert all((other == rows[0]) == (how == "greedy") for other in others)
    assert slow_decode(build(variant, seed=1), PROMPT, 0, 10, sampler, seed=5) != rows[0]


@each({name: VARIANTS[name] for name in ("learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full")})
def test_a_long_text_too(variant: dict[str, Any]) -> None:
    """... in which a windowed cache has long given up the tokens it started with."""
    model = build(variant).eval()
    [row] = fast_decode(model, PROMPT, 1, 160, SAMPLERS["sampled"], seed=0)
    assert row == slow_decode(model, PROMPT, 0, 160, SAMPLERS["sampled"], seed=0)


def test_a_wrong_cache_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(VARIANTS["rope-gqa-window-5"]).eval()
    right = fast_decode(model, PROMPT, 1, 20, SAMPLERS["greedy"], seed=0)
    for block in model.blocks:
        monkeypatch.setattr(block.attn, "window", 4)
    assert fast_decode(model, PROMPT, 1, 20, SAMPLERS["greedy"], seed=0) != right


@pytest.mark.parametrize("length", [1, 3, 7, 8])
def test_learned_positions_end(length: int) -> None:
    """With 8 positions, the last token is predicted from 8 others."""
    model = build(SHAPE | {"max_seq_len": 8}).eval()
    rows = fast_decode(model, PROMPT[:length], 2, 99, SAMPLERS["sampled"], seed=0)
    assert [len(row) for row in rows] == [8 - length + 1] * 2
    assert rows[1] == slow_decode(model, PROMPT[:length], 1, 8 - length + 1, SAMPLERS["sampled"], seed=0)
    [sample] = generate(model, TOKENIZER, ALPHABET[:length], max_new_tokens=99, seed=3)
    assert sample.finish_reason == "length" and len(sample.token_ids) <= 8 - length + 1


@pytest.mark.parametrize("windows", [None, [3]])
def test_rope_goes_on_beyond_the_trained_length(windows: list[int] | None) -> None:
    model = build(SHAPE | {"max_seq_len": 8, "position": "rope", "windows": windows}).eval()
    [row] = fast_decode(model, PROMPT, 1, 30, SAMPLERS["sampled"], seed=0)
    assert row == slow_decode(model, PROMPT, 0, 30, SAMPLERS["sampled"], seed=0)
    assert len(row) == 30


def test_each_step_reads_one_token() -> None:
    model, read = build(VARIANTS["learned-mha-full"]).eval(), []
    with model.register_forward_hook(lambda _, args, __: read.append(tuple(args[0].shape))):
        fast_decode(model, PROMPT, 4, 6, SAMPLERS["greedy"], seed=0)
    assert read == [(1, 9)] + [(1, 4)] * 5


# --- Text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> GPT2:
    return build(VARIANTS["rope-gqa-window-4-full"]).eval()


def ask(model: GPT2, **arguments: Any) -> list[Sample]:
    return generate(model, TOKENIZER, TOKENIZER.decode(PROMPT), **({"max_new_tokens": 12, "seed": 5} | arguments))


def test_sample_i_does_not_depend_on_how_many_are_asked_for(model: GPT2) -> None:
    five = ask(model, num_samples=5)
    assert five[:2] == ask(model, num_samples=2) and five[:1] == ask(model)
    assert len({sample.text for sample in five}) == 5


def test_the_same_seed_is_the_same_text(model: GPT2) -> None:
    torch.manual_seed(1)
    first, state = ask(model), torch.get_rng_state()
    torch.rand(3)
    assert ask(model) == first
    assert ask(model, seed=6) != first
    torch.manual_seed(1)
    ask(model)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers were drawn


def test_a_shorter_text_is_the_start_of_a_longer_one(model: GPT2) -> None:
    assert ask(model, max_new_tokens=30)[0].token_ids[:12] == ask(model)[0].token_ids


def test_settings_of_the_sampler_arrive(model: GPT2) -> None:
    greedy = ask(model, temperature=0)
    assert ask(model, top_k=1) == ask(model, top_p=1e-9) == greedy == ask(model, temperature=0, seed=6)
    assert greedy != ask(model) != ask(model, temperature=5)


def test_it_ends_at_the_end_of_a_text(model: GPT2) -> None:
    raw = fast_decode(model, PROMPT, 40, 30, Sampler(2.0), seed=0)
    samples = ask(model, num_samples=40, max_new_tokens=30, temperature=2, seed=0)
    for row, sample in zip(raw, samples, strict=True):
        ends = TOKENIZER.end_of_text in row
        assert sample.finish_reason == ("stop" if ends else "length")
        assert sample.token_ids == (row[: row.index(TOKENIZER.end_of_text)] if ends else row)
        assert sample.text == TOKENIZER.decode(sample.token_ids)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_nothing_is_computed_once_all_have_ended(model: GPT2) -> None:
    calls = 0
    with scripted(model, [7, 7, TOKENIZER.end_of_text, 7]) as read:
        [one, two] = ask(model, num_samples=2)
        calls = len(read)
    assert one == two == Sample(TOKENIZER.decode([7, 7]), [7, 7], "stop")
    assert calls == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_training_generates_without_dropout_and_goes_on_training(training: bool, model: GPT2) -> None:
    dropping = build(VARIANTS["rope-gqa-window-4-full"] | {"dropout": 0.5}).train(training)
    assert ask(dropping) == ask(model)
    assert all(module.training == training for module in dropping.modules())


# --- Streams ----------------------------------------------------------------------------------------------------------


@contextmanager
def scripted(model: GPT2, script: list[int]) -> Iterator[list[int]]:
    """Let a model say these tokens, whatever it is asked; yields the list of those it has said."""
    said: list[int] = []

    def recite(_module: nn.Module, _args: Any, logits: Tensor) -> Tensor:
        said.append(script[len(said) % len(script)])
        return torch.full_like(logits, -100).index_fill_(2, torch.tensor([said[-1]]), 100)

    with model.register_forward_hook(recite):
        yield said


BYTES = Tokenizer.bytes()
SPEAKER = GPT2(BYTES.vocab_size, 64, 8, 1, 8, 1).eval()


def stream(script: list[int]) -> tuple[list[str], Sample]:
    """The pieces that were shown, and what came out."""
    pieces: list[str] = []
    with scripted(SPEAKER, script):
        [sample] = generate(SPEAKER, BYTES, "?", max_new_tokens=len(script), on_text=pieces.append)
    return pieces, sample


@given(script=st.lists(st.integers(0, 256) | st.sampled_from(list("é€🙂".encode())), min_size=1, max_size=30))
@example(script=list("a\ufffd".encode()))
@example(script=list("🙂".encode()[:3]) + list(b"x"))
@example(script=list("€".encode()[:2]))
@example(script=[0xF0, 0x9F, 0xE2, 0x82, 0xAC])
def test_the_pieces_are_the_text(script: list[int]) -> None:
    pieces, sample = stream(script)
    assert "".join(pieces) == sample.text
    assert all(pieces)


@given(text=st.text(st.characters(exclude_characters="\ufffd"), min_size=1, max_size=12))
@example(text="é€🙂\u0301 x")
def test_no_half_of_a_character_is_shown(text: str) -> None:
    script = list(text.encode())[:60]
    pieces, _ = stream([*script, BYTES.end_of_text])
    shown = "".join(pieces)
    assert shown.rstrip("\ufffd") == script_text(script).rstrip("\ufffd")
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def script_text(script: list[int]) -> str:
    return bytes(script).decode(errors="replace")


def test_each_character_is_shown_as_soon_as_it_is_whole() -> None:
    pieces, sample = stream(list("aé€🙂b".encode()))
    assert pieces == ["a", "é", "€", "🙂", "b"] and sample.text == "aé€🙂b"
    assert stream(list(b"a\xffb"))[0] == ["a", "\ufffd", "b"]


def test_only_the_first_sample_is_streamed(model: GPT2) -> None:
    pieces: list[str] = []
    samples = ask(model, num_samples=3, on_text=pieces.append)
    assert "".join(pieces) == samples[0].text != samples[1].text


# --- Errors -----------------------------------------------------------------------------------------------------------

LEARNED = build(SHAPE | {"max_seq_len": 8})
ERRORS: list[tuple[str, dict[str, Any], type[LabError], str]] = [
    ("", {}, ConfigError, "empty prompt"),
    (ALPHABET[:9], {}, ConfigError, "9 tokens; this model has learned positions for 8"),
    ("0", {"num_samples": 0}, ConfigError, "--num-samples"),
    ("0", {"max_new_tokens": 0}, ConfigError, "--max-new-tokens"),
    ("0", {"temperature": -1}, ConfigError, "--temperature"),
    ("Ü", {}, DataError, r"'\\xdc'"),
]


@pytest.mark.parametrize(("prompt", "arguments", "kind", "words"), ERRORS, ids=[words for *_, words in ERRORS])
def test_what_cannot_be_done_is_refused(
    prompt: str, arguments: dict[str, Any], kind: type[LabError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        generate(LEARNED, TOKENIZER, prompt, **arguments)


def test_a_refused_prompt_leaves_a_model_in_training() -> None:
    LEARNED.train()
    with pytest.raises(ConfigError):
        generate(LEARNED, TOKENIZER, "")
    assert LEARNED.training


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError):
        generate(LEARNED, TOKENIZER, "0", seed=-1)
