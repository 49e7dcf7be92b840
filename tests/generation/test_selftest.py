"""The self-test passes for every model, and finds each fault that is planted."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from gpt2lab.generation import selftest as selftest_module
from gpt2lab.generation.prepare import for_reading
from gpt2lab.generation.selftest import Finding, selftest
from gpt2lab.model.cache import Cache, KVCache, LayerSideBySide
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.reading import Quantize
from tests.model.test_variants import VARIANTS, build, each

unchecked = pytest.mark.usefixtures("unchecked_shapes")  # four fifths of the time; one test here is checked
KINDS: tuple[Quantize | None, ...] = (None, "int8")
HARD = {name: VARIANTS[name] for name in ("rope-mqa-window-4-full", "learned-gqa-windows-3-7-experts", "modern")}
LONG = 40
"""Tokens after which the longest text has moved the buffer of a window."""


def failing(model: GPT2, num_tokens: int = LONG) -> list[str]:
    findings = list(selftest(model, num_tokens))
    assert findings[-1].name.startswith("control") and findings[-1].passed and not findings[-1].same_bits
    return [finding.name for finding in findings if not finding.passed]


@cache
def plain() -> GPT2:
    return build(VARIANTS["learned-mha-full"]).eval()


@unchecked
@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few short texts; whole and in eight bits by turns: each position and window is met in both, one of PARTS in one."""
    monkeypatch.setattr(selftest_module, "PROMPT_LENGTHS", (1, 12, 5))
    kind = KINDS[list(VARIANTS).index(name) % 2]
    assert failing(for_reading(build(VARIANTS[name]).eval(), kind), 9) == []


@unchecked
@each(HARD)
@pytest.mark.parametrize("kind", KINDS)
def test_longer_texts_pass(variant: dict[str, Any], kind: Quantize | None) -> None:
    assert failing(for_reading(build(variant).eval(), kind)) == []


def test_what_it_compares() -> None:
    findings: list[Finding] = list(selftest(plain(), 12))
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
    assert findings[0].compared == 12 * 61 and findings[3].compared == 6 * 12


@unchecked
def test_a_sound_model_passes() -> None:
    """What the faults below are held against."""
    assert failing(plain()) == []


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


@unchecked
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    findings: list[Finding] = []
    ended = False
    with suppress(ValueError):  # a cache that is too full to go on has told already
        findings.extend(selftest(plain(), LONG))
        ended = True
    assert ended or plant is forgets_to_roll_back
    assert not ended or any(FAULTS[plant] in finding.name for finding in findings if not finding.passed)


@unchecked
def test_fewer_bits_are_judged_by_what_they_can_tell() -> None:
    rough = build(VARIANTS["learned-mha-full"]).eval().bfloat16()
    assert selftest_module._near(plain()) < selftest_module._near(rough)
    assert failing(rough) == []
