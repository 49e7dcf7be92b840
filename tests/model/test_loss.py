"""The loss of each token by itself; that a model returns it is a test of every variant."""

import torch

from gpt2lab.model.loss import IGNORE, token_losses
from tests.reference import assert_differ, assert_same


def test_a_loss_is_minus_the_log_of_the_target_s_probability() -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    targets[1, 2:] = IGNORE
    losses = token_losses(logits, targets)
    for b in range(2):
        for t in range(5):
            if targets[b, t] == IGNORE:
                assert losses[b, t] == 0
            else:
                exact = logits[b, t].double().exp().sum().log() - logits[b, t].double()
                assert_same(losses[b, t], exact[targets[b, t]], within=1e-6)
                assert_differ(losses[b, t], exact[(targets[b, t] + 1) % 7], by=1e-3, what="the next token")


def test_the_sum_over_tokens_is_the_sum_over_any_split_of_them() -> None:
    """So that padding, accumulation and ranks agree: no mean is taken here."""
    logits, targets = torch.randn(4, 6, 7), torch.randint(7, (4, 6))
    targets[0, 1:] = targets[3] = IGNORE
    whole = token_losses(logits, targets).sum()
    parts = sum(token_losses(logits[row : row + 1], targets[row : row + 1]).sum() for row in range(4))
    assert_same(whole, parts, within=1e-5)
    of_means = sum(token_losses(logits[row], targets[row]).mean() for row in (slice(0, 2), slice(2, 4))) / 2
    assert_differ(whole / (targets != IGNORE).sum(), of_means, by=1e-2, what="a mean of means")


def test_half_precision_logits_are_scored_in_single() -> None:
    logits, targets = torch.randn(2, 5, 7).bfloat16(), torch.randint(7, (2, 5))
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    assert_same(losses, token_losses(logits.float(), targets), within=0)
    assert_differ(losses, token_losses(logits.float(), targets).bfloat16(), by=1e-4, what="rounded to bf16")


def test_extreme_logits_cost_what_they_should() -> None:
    assert token_losses(torch.tensor([[[1e4, -1e4]]]), torch.tensor([[1]])).item() == 2e4
    assert token_losses(torch.tensor([[[1e4, -1e4]]]), torch.tensor([[0]])).item() == 0
