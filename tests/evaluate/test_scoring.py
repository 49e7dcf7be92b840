"""Every token of a text is scored once, with the context it is promised: compared with a forward pass for each token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.evaluate.scoring import losses_by_position, token_losses, windows
from gpt2lab.model.gpt2 import GPT2
from tests.reference import assert_differ, assert_same

VOCAB = 61


def build(**variant: object) -> GPT2:
    """A model in float64, with weights so large that one token more of context shows in the losses."""
    model = GPT2(VOCAB, 64, 32, 4, 48, 2, **variant)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def text(num_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=num_tokens)


@torch.inference_mode()
def loss_of_each_token(model: GPT2, token_ids: np.ndarray, seq_len: int, stride: int, more: int = 0) -> Tensor:
    """The definition: token i + 1 after its window was read up to token i. `more` lets the window start earlier."""
    losses = []
    for i in range(len(token_ids) - 1):
        number = max(0, math.ceil((i + 1 - seq_len) / stride))  # of the first window that reaches beyond token i
        context = torch.from_numpy(token_ids[max(0, number * stride - more) : i + 1])[None]
        losses.append(-model(context)[0, -1].log_softmax(-1)[token_ids[i + 1]])
    return torch.stack(losses)


# --- Windows ----------------------------------------------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(num_tokens, seq_len, stride)."""
    seq_len = draw(st.integers(1, 40))
    return draw(st.integers(0, 200)), seq_len, draw(st.integers(1, seq_len))


@settings(max_examples=300)
@given(cuts())
def test_windows_score_every_target_once_with_the_context_they_promise(cut: tuple[int, int, int]) -> None:
    num_tokens, seq_len, stride = cut
    scored = []
    for number, (start, length, done) in enumerate(windows(num_tokens, seq_len, stride)):
        assert start == number * stride and 0 <= done < length <= seq_len and start + length < num_tokens
        scored += range(start + done, start + length)
        assert number == 0 or done >= seq_len - stride
    assert scored == list(range(max(0, num_tokens - 1)))


@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "stride", "expected"),
    [
        (0, 4, 4, []),
        (1, 4, 4, []),
        (2, 4, 4, [(0, 1, 0)]),
        (9, 4, 4, [(0, 4, 0), (4, 4, 0)]),
        (10, 4, 4, [(0, 4, 0), (4, 4, 0), (8, 1, 0)]),
        (10, 4, 2, [(0, 4, 0), (2, 4, 2), (4, 4, 2), (6, 3, 2)]),
        (7, 4, 1, [(0, 4, 0), (1, 4, 3), (2, 4, 3)]),
    ],
)
def test_windows_by_hand(num_tokens: int, seq_len: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    assert list(windows(num_tokens, seq_len, stride)) == expected


# --- Losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [{}, {"position": "rope", "num_kv_heads": 1, "windows": [5, None]}], ids=["gpt2", "rope"]
)
@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "stride"), [(70, 16, 16), (70, 16, 5), (40, 12, 1), (17, 16, 16), (9, 16, 4)]
)
def test_losses_are_those_of_one_token_at_a_time(
    variant: dict[str, object], num_tokens: int, seq_len: int, stride: int
) -> None:
    model, token_ids = build(**variant), text(num_tokens)
    ours = torch.from_numpy(token_losses(model, token_ids, seq_len, stride))
    assert ours.dtype == torch.float64 and len(ours) == num_tokens - 1
    assert_same(ours, loss_of_each_token(model, token_ids, seq_len, stride), within=1e-5)
    if num_tokens > seq_len + 1:
        wrong = loss_of_each_token(model, token_ids, seq_len, stride, more=1)
        assert_differ(ours, wrong, by=1e-2, what="windows that start a token earlier")


@given(st.integers(2, 40), st.integers(1, 20), st.data())
def test_losses_at_any_length(num_tokens: int, seq_len: int, data: st.DataObject) -> None:
    stride, batch_size = data.draw(st.integers(1, seq_len)), data.draw(st.none() | st.integers(1, 4))
    model, token_ids = build(), text(num_tokens)
    ours = torch.from_numpy(token_losses(model, token_ids, seq_len, stride, batch_size=batch_size))
    assert_same(ours, loss_of_each_token(model, token_ids, seq_len, stride), within=1e-5)


def test_without_a_stride_windows_do_not_overlap() -> None:
    model, token_ids = build(), text(50)
    default, overlapping = token_losses(model, token_ids, 16), token_losses(model, token_ids, 16, 8)
    assert default.tolist() == token_losses(model, token_ids, 16, 16).tolist()
    assert (default[:16] == overlapping[:16]).all() and (default[16:24] != overlapping[16:24]).all()


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_text_without_a_second_token_has_no_losses(num_tokens: int) -> None:
    assert token_losses(build(), text(num_tokens), 16).shape == (0,) != token_losses(build(), text(2), 16).shape


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_and_scored_without_dropout(training: bool) -> None:
    model, token_ids = build(dropout=0.5).train(training), text(50)
    assert token_losses(model, token_ids, 16).tolist() == token_losses(model, token_ids, 16).tolist()
    assert model.training == training
    inputs, targets = torch.from_numpy(token_ids[None, :-1]), torch.from_numpy(token_ids[None, 1:])
    with torch.inference_mode():
        assert (model(inputs, targets) == model(inputs, targets)).all() == (not training)


def test_losses_by_position_are_means_over_windows() -> None:
    model, token_ids = build(), text(49)
    by_hand = np.mean([token_losses(model, token_ids[start : start + 17], 16) for start in (0, 16, 32)], axis=0)
    ours = torch.from_numpy(losses_by_position(model, token_ids, 16, (0, 16, 32)))
    assert_same(ours, torch.from_numpy(by_hand), within=1e-12)
    assert_differ(ours, torch.from_numpy(losses_by_position(model, token_ids, 16, (0, 32))), by=0.1, what="2 windows")
