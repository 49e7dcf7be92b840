"""Experts against a dense MLP: the same work on each token, both layers whole, and the result as it was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt2lab.bench.experts import RATIO, ExpertsBench, bench_experts, make_layers, make_step, table
from gpt2lab.errors import ConfigError
from gpt2lab.tracking import Console
from tests.reference import assert_differ, assert_same

CPU = torch.device("cpu")
SMALL = ExpertsBench(tokens=48, embed_dim=16, ff_hidden_dim=24, rounds=3, device="cpu", turn_seconds=0)


def test_both_layers_put_as_many_weights_to_work_on_a_token() -> None:
    layers = make_layers(SMALL, CPU)
    matrices = {who: sum(w.numel() for w in layer.parameters() if w.numel() > 500) for who, layer in layers.items()}
    assert matrices["dense"] == 2 * 16 * 48
    assert matrices["experts"] * SMALL.experts_per_token == matrices["dense"] * SMALL.num_experts


def test_a_step_is_the_layer_and_the_gradients_of_all_it_has() -> None:
    layers = make_layers(SMALL, CPU)
    for layer in layers.values():
        out, dx, *gradients = make_step(layer, SMALL, CPU, torch.float32)()
        assert out.shape == dx.shape == (1, 48, 16)
        for (name, weight), gradient in zip(layer.named_parameters(), gradients, strict=True):
            assert gradient.shape == weight.shape and gradient.any(), name
    dense, experts = (make_step(layer, SMALL, CPU, torch.float32)()[0] for layer in layers.values())
    assert_differ(dense, experts, by=1e-3, what="dense and experts")
    in_bf16 = make_step(layers["experts"], SMALL, CPU, torch.bfloat16)()
    assert in_bf16[0].dtype == torch.bfloat16 and in_bf16[-1].dtype == torch.float32


def test_one_expert_that_works_on_all_tokens_is_the_dense_layer() -> None:
    settings = replace(SMALL, num_experts=1, experts_per_token=1)
    layers = make_layers(settings, CPU)
    dense, experts = (layers[who].state_dict() for who in ("dense", "experts"))
    for name in ("up_proj", "down_proj"):
        experts[f"{name}.weight"].copy_(dense[f"{name}.weight"][None])
        experts[f"{name}.bias"].copy_(dense[f"{name}.bias"][None])
    ours, theirs = (make_step(layers[who], settings, CPU, torch.float32)()[0] for who in ("dense", "experts"))
    assert_same(ours, theirs, within=1e-6)
    x = torch.randn(1, 48, 16)
    by_hand = F.gelu(x @ dense["up_proj.weight"].T + dense["up_proj.bias"], approximate="tanh")
    by_hand = by_hand @ dense["down_proj.weight"].T + dense["down_proj.bias"]
    assert_same(layers["experts"](x), by_hand, within=1e-6)


def test_the_result_is_what_the_rounds_gave(tmp_path: Path) -> None:
    result = bench_experts(replace(SMALL, out=str(tmp_path / "bench")), Console(quiet=True))
    assert json.loads((tmp_path / "bench" / "experts.json").read_text()) == json.loads(json.dumps(result))
    assert [row["who"] for row in result["rows"]] == ["dense", "experts"]
    rounds = [round_["seconds"] for round_ in result["rounds"]["kept"]]
    for row in result["rows"]:
        rates = sorted(48 / seconds[row["who"]] for seconds in rounds)
        assert [row["low"], row["tokens_per_second"], row["high"]] == pytest.approx(rates)
        assert row["what"]
    low, middle, high = sorted(seconds["experts"] / seconds["dense"] for seconds in rounds)
    assert [result["ratios"][RATIO], *result["ranges"][RATIO]] == pytest.approx([middle, low, high])
    assert sum(result["tokens_of_each_expert"]) == 48 * 2
    shown = table(result)
    assert f"{middle:.2f} times as long" in shown and result["machine"] in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, "--tokens=0.*Fix: --tokens=1"),
        ({"experts_per_token": 9}, "--experts-per-token=9.*8 experts.*Fix: --experts-per-token=8"),
        ({"precision": "fp16"}, "--precision=fp16.*Fix: --precision=auto"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        bench_experts(replace(SMALL, out=str(tmp_path / "bench"), **change), Console(quiet=True))
    assert not (tmp_path / "bench").exists()
