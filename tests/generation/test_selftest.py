"""The self-test passes for every model, and finds each fault that is planted."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from torch import Tensor

from gpt2lab.generation import selftest as selftest_module
from gpt2lab.generation.prepare import for_reading
from gpt2lab.generation.selftest import Finding, selftest
from gpt2lab.model.cache import Cache, KVCache, LayerSideBySide
from gpt2lab.model.gpt2 import GPT2
from tests.model.test_variants import VARIANTS, build, each_variant


def failing(model: GPT2) -> list[str]:
    findings = list(selftest(model, 40))
    assert findings[-1].name.startswith("control") and findings[-1].passed and not findings[-1].same_bits
    return [finding.name for finding in findings if not finding.passed]


@each_variant
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_every_model_passes(variant: dict[str, Any], quantize: str | None) -> None:
    assert failing(for_reading(build(variant).eval(), quantize)) == []


def test_what_it_compares() -> None:
    findings: list[Finding] = list(selftest(build(VARIANTS["learned-mha-full"]).eval(), 40))
    assert [finding.name for finding in findings] == [
        "token by token with a cache == at once",
        "in chunks == at once",
        "after wrong drafts are taken back == at once",
        "a batch == each alone, greedy",
        "n-gram drafts == none, greedy",
        "early-exit drafts == none, greedy",
        "a batch == each alone, sampled",
        "n-gram drafts == none, sampled",
        "control: another text != this one",
    ]
    assert findings[0].compared == 40 * 61 and findings[3].compared == 6 * 40


def forgets_to_roll_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cache, "truncate", lambda self, length: None)


def mixes_up_texts(patch: pytest.MonkeyPatch) -> None:
    attend = LayerSideBySide.attend

    def mixed(layer: LayerSideBySide, *qkv: Tensor) -> Tensor:
        layer.texts = list(reversed(layer.texts)) if max(layer.counts) == 1 else layer.texts
        return attend(layer, *qkv)

    patch.setattr(LayerSideBySide, "attend", mixed)


def loses_a_value(patch: pytest.MonkeyPatch) -> None:
    append = KVCache.append

    def loses(cache: KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        return append(cache, k, v * (1 if v.shape[2] > 30 else 0.9))

    patch.setattr(KVCache, "append", loses)


def accepts_all(patch: pytest.MonkeyPatch) -> None:
    def check(text: Any, logits: Tensor, proposal: Any) -> list[int]:
        return [*proposal.token_ids, int(logits[-1].argmax())]

    patch.setattr("gpt2lab.generation.engine.check", check)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    forgets_to_roll_back: "after wrong drafts are taken back",
    mixes_up_texts: "a batch == each alone",
    loses_a_value: "token by token with a cache",
    accepts_all: "early-exit drafts == none",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    assert failing(model) == []
    plant(monkeypatch)
    findings: list[Finding] = []
    ended = False
    with suppress(ValueError):  # a cache that is too full to go on has told already
        findings.extend(selftest(model, 40))
        ended = True
    assert ended or plant is forgets_to_roll_back
    assert not ended or any(FAULTS[plant] in finding.name for finding in findings if not finding.passed)


def test_fewer_bits_are_judged_by_what_they_can_tell() -> None:
    whole, rough = build(VARIANTS["learned-mha-full"]).eval(), build(VARIANTS["learned-mha-full"]).eval().bfloat16()
    assert selftest_module._near(whole) < selftest_module._near(rough)
    assert failing(rough) == []
