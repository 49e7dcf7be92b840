"""What proposes tokens: it proposes what it should, reads nothing twice, and stops where it does not pay."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpt2lab.errors import ConfigError
from gpt2lab.generation import Request, Sampler
from gpt2lab.generation.draft_length import LONGEST, Costs, DraftLength
from gpt2lab.generation.draft_names import drafts_for
from gpt2lab.generation.drafts import Proposal, Statistics
from gpt2lab.generation.model_draft import EarlyExitDrafts, ModelDraft, ModelDrafts, first_layers
from gpt2lab.generation.ngram import SIZES, NgramDrafts
from gpt2lab.model.gpt2 import GPT2
from tests.generation.drafting import CHEAP, FREE, Each, write
from tests.model.test_variants import SHAPE, VARIANTS, build, each, tokens

GREEDY = Sampler(0)
COSTLY = Costs(proposing_each=0.2)
unchecked = pytest.mark.usefixtures("unchecked_shapes")


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed=seed)[0].tolist()


# --- n-grams ----------------------------------------------------------------------------------------------------------


def searched(token_ids: Sequence[int], count: int) -> list[int]:
    """The definition: search the text backwards for its last 4, else 3, else 2 tokens, and copy what follows."""
    for size in SIZES:
        for place in range(len(token_ids) - 1, size - 1, -1):
            if list(token_ids[place - size : place]) == list(token_ids[len(token_ids) - size :]):
                copied = list(token_ids)
                for i in range(count):
                    copied.append(copied[place + i])
                return copied[len(token_ids) :]
    return []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, LONGEST), st.data())
def test_ngrams_propose_what_followed(token_ids: list[int], most: int, data: st.DataObject) -> None:
    draft, length = NgramDrafts(FREE).start(Request([0], 1), 0), 0
    while length < len(token_ids):
        length = data.draw(st.integers(length + 1, len(token_ids)))
        draft.length.learn(1, 1)  # free and promising: as many are proposed as may be
        proposal = draft.propose(token_ids[:length], most)
        expected = searched(token_ids[:length], min(most, draft.length.best))
        assert (proposal.token_ids if proposal is not None else []) == expected


def test_a_token_adds_few_entries_to_the_table() -> None:
    draft, text = NgramDrafts().start(Request([0], 1), 0), prompt(500)
    for length in range(1, 501):
        draft.propose(text[:length], 5)
    assert len(draft.next_place) <= len(SIZES) * 500


def test_ngrams_propose_nothing_before_it_pays() -> None:
    """What was foretold and did not come, or came, is known without a proposal."""

    def proposed(token_ids: list[int]) -> list[bool]:
        draft = NgramDrafts().start(Request([0], 1), 0)
        return [draft.propose(token_ids[:length], LONGEST) is not None for length in range(1, len(token_ids) + 1)]

    repeating, misleading = prompt(40) * 4, [token for new in range(100, 180) for token in (1, 2, new)]
    assert not any(proposed(repeating)[:42]) and all(proposed(repeating)[45:])
    assert not any(proposed(misleading)), "what follows 1 and 2 is never what followed them last"
    assert 3 < sum(proposed([*repeating, *misleading])[160:]) < 15, "it takes a few failures to stop"
    assert sum(proposed([*misleading, *repeating])[240 + 50 :]) == 110


# --- Models -----------------------------------------------------------------------------------------------------------


class Watched:
    """A draft model's proposals, each held against what the model says without a cache."""

    def __init__(self, draft: ModelDraft) -> None:
        self.draft, self.checked, self.prefixes = draft, 0, 0

    def propose(self, token_ids: Sequence[int], most: int) -> Proposal | None:
        proposal = self.draft.propose(token_ids, most)
        if proposal is not None and proposal.probabilities is not None:
            whole = torch.tensor([[*token_ids, *proposal.token_ids]])
            logits = self.draft.model(whole)[0, len(token_ids) - 1 : -1]
            expected = self.draft.request.sampler.probabilities(logits)
            assert torch.allclose(proposal.probabilities, expected, atol=1e-5)
            assert not torch.allclose(proposal.probabilities, expected.flip(-1), atol=1e-5)
            self.checked += len(proposal.token_ids)
        return proposal

    def learn(self, proposed: int, accepted: int) -> None:
        self.draft.learn(proposed, accepted)


@unchecked
@each({name: VARIANTS[name] for name in ("learned-mha-full", "rope-gqa-windows-3-7", "modern")})
def test_a_model_proposes_from_its_own_distribution(variant: dict[str, Any]) -> None:
    """... after rollbacks of any length, and long pauses."""
    model, other = build(variant).eval(), build(variant, seed=1).eval()
    drafts = ModelDrafts(other, model, CHEAP), ModelDrafts(other, model, FREE), ModelDrafts(other, model, COSTLY)
    watched = Each(*(lambda request, i, each=each: Watched(each.start(request, i)) for each in drafts))
    write(model, Request(prompt(9), 80, Sampler(1.0)), 3, watched)
    assert all(draft.checked > 5 for draft in watched.drafts if isinstance(draft, Watched))


def test_what_was_accepted_is_read_once() -> None:
    model, twin = build(VARIANTS["rope-gqa-windows-3-7"]).eval(), build(VARIANTS["rope-gqa-windows-3-7"]).eval()
    read: list[int] = []
    with twin.register_forward_hook(lambda module, args, logits: read.extend(args[0][0].tolist())):
        [text] = write(model, Request(prompt(600), 40, GREEDY), 1, ModelDrafts(twin, model, FREE))
    assert read == [*prompt(600), *text][: len(read)] and len(read) > 630
    # Of a wrong draft it reads again what became text in its place, and no more: what it had read stays.
    other, places = build(VARIANTS["rope-gqa-windows-3-7"], seed=1).eval(), []

    def note(module: nn.Module, args: tuple[torch.Tensor], named: dict[str, Any]) -> None:
        places.extend(range(named["cache"].length, named["cache"].length + args[0].shape[1]))

    drafts = ModelDrafts(other, model, FREE)
    with other.register_forward_pre_hook(note, with_kwargs=True):
        write(model, Request(prompt(9), 30, GREEDY), 1, drafts)
    refused = drafts.statistics.proposed - drafts.statistics.accepted
    assert len(places) <= max(places) + 1 + refused


def test_a_draft_whose_positions_end_stops_proposing() -> None:
    model, other = build(SHAPE).eval(), build(SHAPE | {"max_seq_len": 12}, seed=1).eval()
    draft = ModelDrafts(other, model, FREE).start(Request(prompt(5), 40, GREEDY), 0)
    lengths = [draft.propose(prompt(length), LONGEST) for length in range(6, 15)]
    assert [len(proposal.token_ids) if proposal else 0 for proposal in lengths] == [7, 6, 5, 4, 3, 2, 1, 0, 0]


def test_early_exit_is_the_first_layers_and_shares_them() -> None:
    variant = VARIANTS["modern"] | {"num_layers": 3}
    model = build(variant).eval()
    shallow = first_layers(model, 2)
    assert {id(p) for p in shallow.parameters()} < {id(p) for p in model.parameters()}
    assert not any(p.is_meta for p in shallow.parameters()) and len(model.layers) == 3
    copy = GPT2(**variant | {"num_layers": 2}).eval()
    copy.load_state_dict(model.state_dict(), strict=False)
    token_ids = tokens(1, 12)
    assert torch.equal(shallow(token_ids), copy(token_ids))
    assert not torch.equal(shallow(token_ids), model(token_ids))
    assert first_layers(model, 1).config.windows == (5,)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("ngram", NgramDrafts, ""),
        ("early:1", EarlyExitDrafts, ""),
        ("runs/small", ModelDrafts, ""),
        ("early:0", None, "0 layers of 2"),
        ("early:2", None, "2 layers of 2"),
        ("early:", None, "'' is no number"),
        ("early:-1", None, "'-1' is no number"),
        ("runs/other-tokens", None, "the draft knows 60 tokens, the model 61"),
    ],
)
def test_what_the_flag_says(name: str, kind: type | None, message: str) -> None:
    model = build(SHAPE).eval()
    models = {"runs/small": build(SHAPE | {"num_layers": 1}), "runs/other-tokens": build(SHAPE | {"vocab_size": 60})}
    if kind is not None:
        assert type(drafts_for(name, model, models.__getitem__)) is kind
        return
    with pytest.raises(ConfigError, match=message) as refused:
        drafts_for(name, model, models.__getitem__)
    assert refused.value.where == "--draft" and ("early:1" in refused.value.fix) == name.startswith("early")


# --- Lengths and what is counted --------------------------------------------------------------------------------------


def simulated(acceptance: float, costs: Costs, length: int, seed: int) -> Statistics:
    """Of a text whose drafts are accepted so often."""
    statistics, chance = Statistics(costs.break_even), random.Random(seed)
    lengths = DraftLength(costs, statistics)
    while statistics.steps + statistics.accepted < length:
        proposed = lengths.best_or_again()
        lengths.count_step(proposed)
        accepted = next((i for i in range(proposed) if chance.random() >= acceptance), proposed)
        lengths.learn(lengths.count_tested(proposed, accepted), accepted)
    return statistics


@pytest.mark.parametrize("proposing", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_a_draft_costs_little_where_it_does_not_pay_and_pays_where_it_can(proposing: float) -> None:
    costs = Costs(proposing_each=proposing)
    for acceptance in (0.0, 0.2, 0.5, 0.8, 1.0):
        speed_up = sum(simulated(acceptance, costs, 256, seed).speed_up for seed in range(10)) / 10
        best = costs.best(acceptance)
        possible = sum(acceptance**i for i in range(best + 1)) / costs.step(best)
        assert speed_up > 0.95 and (speed_up > 0.85 * possible or costs.break_even > 0.9)


@pytest.mark.parametrize("costs", [Costs(), COSTLY, Costs(0.3, 0.01)])
def test_break_even_is_where_proposing_begins_to_pay(costs: Costs) -> None:
    def gain(acceptance: float, length: int) -> float:
        return sum(acceptance**i for i in range(length + 1)) / costs.step(length)

    edge = costs.break_even
    assert all(gain(edge - 0.011, length) <= 1 for length in range(1, LONGEST + 1))
    assert any(gain(edge + 0.001, length) > 1 for length in range(1, LONGEST + 1))
    for acceptance in (0.05, 0.4, 0.8, 0.99):
        assert gain(acceptance, costs.best(acceptance)) == max(gain(acceptance, i) for i in range(LONGEST + 1))


def test_what_is_proposed_for_nothing_becomes_rare() -> None:
    statistics = simulated(0.0, Costs(), 2000, seed=0)
    assert 10 < statistics.proposed < 120 and statistics.speed_up > 0.99
    assert simulated(0.0, Costs(proposing_each=2.0), 500, seed=0).proposed == 0


def test_the_statistics_count_what_was_written() -> None:
    model = build(SHAPE).eval()
    request = Request(prompt(9), 40, GREEDY)
    [text] = write(model, request)
    drafts = NgramDrafts(FREE)
    [same] = write(model, Request([*prompt(9), *text], 40, GREEDY), 1, drafts)
    counted = drafts.statistics
    assert len(same) == 40
    assert counted.steps + counted.accepted <= 39 <= counted.steps + counted.accepted + 1  # the first is the prompt's
    assert counted.accepted <= counted.tested <= counted.proposed
    assert counted.tokens_per_step == (counted.steps + counted.accepted) / counted.steps
    assert counted.speed_up == counted.tokens_per_step  # nothing costs anything
    assert Statistics(0.1).acceptance == 0 and Statistics(0.1).speed_up == 1
