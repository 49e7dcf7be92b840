"""Documents that share a sequence: each is read as if it were alone, in every variant, where its borders are borders."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.model.attend import SMALLEST_BLOCK, attend, visible
from gpt2lab.model.borders import Borders, places_in_documents
from gpt2lab.model.gpt2 import GPT2
from tests import reference
from tests.model.test_attention import LENGTHS_AND_WINDOWS, cost, heads, with_gradients
from tests.model.test_variants import LONG, SHAPE, SHORT, VARIANTS, build, each, each_variant, looks_back, tokens
from tests.reference import assert_differ, assert_same, documents_of, gpt2_logits

END = 0
"""The id that closes a document here."""
ALONE = Borders(END, attend_across=False, restart_positions=True)
LENGTHS = [[20, 1, 70, 5, LONG - 96], [LONG - 66, 3, 63]]
"""Of the documents in two sequences of LONG tokens; some are longer than a block of queries, one is an end-of-text alone."""


def document(length: int, seed: int, *, closed: bool = True) -> Tensor:
    """Ids that are no end-of-text, and one at the end."""
    ids = 1 + tokens(1, length, vocab_size=SHAPE["vocab_size"] - 1, seed=seed)[0]
    ids[-1] = END if closed else ids[-1]
    return ids


def packed(lengths: list[list[int]] = LENGTHS) -> tuple[Tensor, list[list[Tensor]]]:
    """Sequences, and the documents they are made of; the last of each is cut off, and has no end-of-text."""
    rows = [
        [document(length, 10 * row + at, closed=at < len(those) - 1) for at, length in enumerate(those)]
        for row, those in enumerate(lengths)
    ]
    return torch.stack([torch.cat(row) for row in rows]), rows


# --- Where documents begin --------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3))
def test_places_are_those_a_loop_counts(ids: list[list[int]]) -> None:
    expected = [[t - row.index(number) for t, number in enumerate(row)] for row in (documents_of(r, END) for r in ids)]
    assert places_in_documents(torch.tensor(ids), END).tolist() == expected


def test_an_end_of_text_is_the_last_token_of_its_document() -> None:
    assert places_in_documents(torch.tensor([[5, 6, END, 7, END, END, 8]]), END).tolist() == [[0, 1, 2, 0, 1, 0, 0]]


def test_borders_that_mean_nothing_give_the_model_nothing() -> None:
    ids = torch.tensor([[5, END, 7, 8]])
    assert Borders(END)(ids) == {}
    given = {name: value.tolist() for name, value in ALONE(ids).items()}
    assert given == {"reach": [[1, 2, 1, 2]], "positions": [[0, 1, 0, 1]]}
    assert list(Borders(END, attend_across=False)(ids)) == ["reach"]
    assert list(Borders(END, restart_positions=True)(ids)) == ["positions"]


# --- One mask rule ----------------------------------------------------------------------------------------------------


def test_a_reach_is_a_window_for_each_token() -> None:
    seen = visible(torch.arange(4), torch.arange(4), torch.tensor([[1, 2, 1, 2], [1, 1, 2, 9]])).tolist()
    assert [["".join("01"[x] for x in query) for query in row] for row in seen] == [
        ["1000", "1100", "0010", "0011"],
        ["1000", "0100", "0110", "1111"],
    ]


@given(
    ends=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=2),
    kv_heads=st.integers(1, 2), group=st.integers(1, 2), window=st.none() | st.integers(1, 10),
)  # fmt: skip
def test_attend_is_the_reference(ends: list[list[bool]], kv_heads: int, group: int, window: int | None) -> None:
    ids = 1 - torch.tensor(ends, dtype=torch.int64)
    q, (k, v) = heads(len(ends), kv_heads * group, 9), (heads(len(ends), kv_heads, 9) for _ in range(2))
    ours = attend(q, k, v, window=window, reach=places_in_documents(ids, END)[:, None] + 1)
    documents = [documents_of(row, END) for row in ids.tolist()]
    assert_same(ours, reference.attention(q, k, v, window=window, documents=documents), within=1e-13)


@pytest.mark.parametrize(("time", "window"), LENGTHS_AND_WINDOWS)
@pytest.mark.parametrize("group", [1, 3])
def test_blocks_are_the_masked_square(time: int, window: int, group: int, in_blocks: list[int]) -> None:
    q, k, v = heads(2, 2 * group, time), heads(2, 2, time), heads(2, 2, time)
    ids, direction = torch.randint(12, (2, time)), torch.randn_like(q)
    reach = places_in_documents(ids, END)[:, None] + 1

    def in_a_square(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
        same = torch.tensor([documents_of(row, END) for row in ids.tolist()])
        seen = (same[:, :, None] == same[:, None, :]) & visible(torch.arange(time), torch.arange(time), window)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return (q @ k.mT / 2).masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v

    ours = with_gradients(lambda *qkv, window: attend(*qkv, window=window, reach=reach), q, k, v, window, direction)
    assert in_blocks == [window]
    truth = with_gradients(in_a_square, q, k, v, window, direction)
    wrong = with_gradients(attend, q, k, v, window, direction)
    for name, ours_, truth_, wrong_ in zip(["out", "dq", "dk", "dv"], ours, truth, wrong, strict=True):
        assert_same(ours_, truth_, within=1e-12, what=name)
        if window > 1:
            assert_differ(ours_[:, :, SMALLEST_BLOCK:], wrong_[:, :, SMALLEST_BLOCK:], by=1e-2, what=f"{name}, across")


def test_with_borders_a_window_still_pays_for_two_blocks_a_query() -> None:
    window, time = SMALLEST_BLOCK, 20 * SMALLEST_BLOCK

    def with_reach(time: int) -> tuple[int, int]:
        return cost(time, window=window, reach=torch.randint(1, 99, (1, 1, time)))

    assert with_reach(time)[0] == cost(time, window=window)[0]
    assert with_reach(2 * time)[1] <= 2.1 * with_reach(time)[1] < cost(time, reach=torch.ones(1, 1, time).long())[1]


# --- The model --------------------------------------------------------------------------------------------------------


def losses_and_gradients(model: GPT2, *passes: tuple[Tensor, Tensor, dict[str, Tensor]]) -> tuple[list[Tensor], Any]:
    """The losses of each pass, and the gradients of their sum."""
    losses = [model(ids, targets, **given) for ids, targets, given in passes]
    total = torch.stack([x.sum() for x in losses]).sum()
    return losses, dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(total, list(model.parameters())), strict=True)
    )


@each_variant
def test_documents_that_share_a_sequence_are_each_alone(variant: dict[str, Any], in_blocks: list[int]) -> None:
    """Token by token the loss, and every gradient; but not where borders mean nothing, or positions go on."""
    model = build(variant).double()
    token_ids, rows = packed()
    targets = tokens(2, LONG, seed=9)
    [together], ours = losses_and_gradients(model, (token_ids, targets, ALONE(token_ids)))
    assert bool(in_blocks) == any(model.config.windows or ())
    cut = [
        part
        for row, those in zip(targets, rows, strict=True)
        for part in row.split([len(document) for document in those])
    ]
    alone, theirs = losses_and_gradients(
        model,
        *[
            (document[None], part[None], {})
            for document, part in zip([d for row in rows for d in row], cut, strict=True)
        ],
    )
    assert_same(together.flatten(), torch.cat([losses[0] for losses in alone]), within=1e-10)
    for name, gradient in theirs.items():
        assert_same(ours[name], gradient, within=1e-9 * max(1.0, gradient.abs().max().item()), what=name)

    wrongs = {"positions go on": Borders(END, attend_across=False)} if model.config.position == "learned" else {}
    if looks_back(model.config):
        wrongs["across documents"] = Borders(END)
    for what, borders in wrongs.items():
        [losses], gradients = losses_and_gradients(model, (token_ids, targets, borders(token_ids)))
        assert_differ(losses[:, 20:], together[:, 20:], by=1e-2, what=what)
        name = "token_embedding.weight"
        assert_differ(gradients[name], ours[name], by=1e-2, what=f"{what}, gradient of {name}")


@pytest.mark.parametrize("name", [name for name in VARIANTS if "rope" in name])
@torch.no_grad()
def test_with_rope_alone_is_alone_wherever_positions_count_from(name: str) -> None:
    model, (token_ids, _) = build(VARIANTS[name]).double(), packed()
    without = model(token_ids, **Borders(END, attend_across=False)(token_ids))
    assert_same(model(token_ids, **ALONE(token_ids)), without, within=1e-4)  # angles are fp32
    if looks_back(model.config):
        across = model(token_ids, **Borders(END, restart_positions=True)(token_ids))
        assert_differ(across, without, by=1e-3, what="across")


@each_variant
@torch.no_grad()
def test_logits_are_the_reference(variant: dict[str, Any]) -> None:
    model, (token_ids, _) = build(variant), packed([[3, 1, SHORT - 4], [5, SHORT - 5]])
    documents = [documents_of(row, END) for row in token_ids.tolist()]
    for restart in (False, True) if model.config.position == "learned" else (True,):
        borders = Borders(END, attend_across=False, restart_positions=restart)
        logits = model(token_ids, **borders(token_ids))
        truth = gpt2_logits(model.state_dict(), model.config, token_ids, documents=documents, restart=restart)
        assert_same(logits, truth, within=1e-5)
    wrong = [[number + (t == 5) for t, number in enumerate(row)] for row in documents]  # one token elsewhere
    if looks_back(model.config):
        wrong_logits = gpt2_logits(model.state_dict(), model.config, token_ids, documents=wrong, restart=True)
        assert_differ(logits, wrong_logits, by=1e-3, what="a token that belongs to another document")


@each(VARIANTS | {"dropout": SHAPE | {"dropout": 0.1, "windows": [5, None]}})
def test_a_logit_depends_on_exactly_the_tokens_of_its_document_in_reach(variant: dict[str, Any]) -> None:
    model, (token_ids, _) = build(variant).double(), packed()
    caught: list[Tensor] = []
    hook = model.token_embedding.register_forward_hook(lambda module, inputs, output: caught.append(output))
    logits = model(token_ids, **ALONE(token_ids))
    hook.remove()
    number = torch.tensor([documents_of(row, END) for row in token_ids.tolist()])
    for t in (19, 20, 21, 91, 96, LONG - 1):
        direction = torch.randn(2, logits.shape[-1]).to(logits)
        [gradient] = torch.autograd.grad((logits[:, t] * direction).sum(), caught, retain_graph=True)
        distance = t - torch.arange(LONG)
        expected = (distance >= 0) & (distance <= looks_back(model.config)) & (number == number[:, t : t + 1])
        found = gradient.abs().sum(-1) > 0
        assert not (found & ~expected).any(), f"logits[{t}] depend on another document"
        all_of_it = found.equal(expected) or model.config.dropout > 0  # which may drop any
        assert all_of_it, f"logits[{t}] do not depend on all of their document"


@each_variant
@torch.no_grad()
def test_without_borders_nothing_changes_to_the_bit(variant: dict[str, Any]) -> None:
    model, token_ids = build(variant), tokens(2, LONG)
    assert torch.equal(model(token_ids, reach=None, positions=None), model(token_ids))
    everything = torch.arange(1, LONG + 1).expand(2, -1)
    places = everything - 1
    assert torch.equal(model(token_ids, positions=places), model(token_ids))
    assert_same(model(token_ids, reach=everything), model(token_ids), within=1e-5)
    if looks_back(model.config):
        assert_differ(model(token_ids, reach=torch.ones_like(everything)), model(token_ids), by=1e-3, what="reach 1")


@pytest.mark.parametrize("given", ["reach", "positions"])
def test_borders_and_a_cache_are_refused(given: str) -> None:
    model, token_ids = build(VARIANTS["learned-mha-full"]), tokens(1, SHORT)
    cache = model.new_cache(1, SHORT)
    with pytest.raises(ValueError, match="without a cache"):
        model(token_ids, cache=cache, **{given: torch.ones_like(token_ids)})
    assert cache.length == 0


@pytest.mark.usefixtures("unchecked_shapes")
@torch.no_grad()
def test_the_model_compiles_as_one_graph() -> None:
    model, (token_ids, _) = build(VARIANTS["rope-gqa-windows-3-7"] | {"windows": [5, None]}), packed()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(compiled(token_ids, **ALONE(token_ids)), model(token_ids, **ALONE(token_ids)), within=1e-6)
    assert_differ(compiled(token_ids), model(token_ids, **ALONE(token_ids)), by=1e-3, what="across documents")
    torch._dynamo.reset()
