"""A model with other parts: the same function where that is said, another one where not, and every weight accounted for."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.config import GPT2Config
from gpt2lab.errors import ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import Routing
from gpt2lab.weights.changes import CHANGES
from gpt2lab.weights.convert import FIXED, Converted, convert, max_logit_difference
from tests.model.test_variants import SHAPE, build, tokens
from tests.reference import assert_differ, assert_same, gpt2_logits, planted_faults

SMALL = SHAPE | {"max_seq_len": 16}
ROPE, EXPERTS = {"position": "rope"}, {"num_experts": 4, "experts_per_token": 2}
YARN = ROPE | {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_base": 100.0, "max_seq_len": 256}
Prepare = Callable[[GPT2], None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(model: GPT2, **changes: Any) -> Converted:
    return convert(model, changes, generator())


def hashed(model: GPT2) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()


@torch.inference_mode()
def logits(model: GPT2, time: int = 16) -> Tensor:
    return model(tokens(2, time))


def heads_of(model: GPT2, layer: int, kind: str = "weight") -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The rows of each query, key and value head."""
    config, rows = model.config, getattr(model.blocks[layer].attn.qkv_proj, kind).detach()
    dim, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads or config.num_heads
    each = [rows[first : first + dim] for first in range(0, len(rows), dim)]
    assert len(each) == heads + 2 * kv_heads
    return each[:heads], each[heads : heads + kv_heads], each[heads + kv_heads :]


# --- What is prepared in a source, so that a change of it is exact -----------------------------------------------------


def as_it_is(model: GPT2) -> None:
    """Nothing is prepared."""


def equal_pairs(model: GPT2) -> None:
    """Key and value heads 0 and 1 are equal, 2 and 3 are."""
    for layer in range(len(model.blocks)):
        for kind in ("weight", "bias"):
            for heads in heads_of(model, layer, kind)[1:]:
                for first in range(0, len(heads), 2):
                    heads[first + 1].copy_(heads[first])


def equal_neighbours_but_in_turn(model: GPT2) -> None:
    """Key and value heads 0 and 2 are equal, 1 and 3 are: equal only to one who groups them in turn."""
    for layer in range(len(model.blocks)):
        for kind in ("weight", "bias"):
            for heads in heads_of(model, layer, kind)[1:]:
                heads[2].copy_(heads[0])
                heads[3].copy_(heads[1])


def equal_experts(model: GPT2) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.up_proj" in name or "mlp.down_proj" in name:
                parameter[1:] = parameter[0]


def no_biases(model: GPT2) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()


def head_is_embedding(model: GPT2) -> None:
    """But for the rows that are no tokens."""
    with torch.no_grad():
        model.head.weight[: model.vocab_size] = model.token_embedding.weight[: model.vocab_size]


EXACT: dict[str, tuple[dict[str, Any], Prepare, dict[str, Any], float, str]] = {
    "kv heads repeated": ({"num_kv_heads": 2}, as_it_is, {"num_kv_heads": 4}, 1e-5, "stands there 2 times"),
    "one kv head repeated": ({"num_kv_heads": 1}, as_it_is, {"num_kv_heads": None}, 1e-5, "1 -> 4.*4 times"),
    "kv heads repeated under rope": (
        ROPE | {"num_kv_heads": 2, "qk_norm": True}, as_it_is, {"num_kv_heads": 4}, 1e-5, "2 times",
    ),
    "equal kv heads pooled": ({}, equal_pairs, {"num_kv_heads": 2}, 1e-5, "the 2 KV heads of each group were equal"),
    "equal kv heads without biases": ({}, lambda m: (no_biases(m), equal_pairs(m)), {"num_kv_heads": 2}, 1e-5, "equal"),
    "wide windows": ({}, as_it_is, {"windows": [16, None]}, 0, "of up to 16 tokens"),
    "windows that were wide": ({"windows": [20]}, as_it_is, {"windows": [16]}, 0, "sees those it saw"),
    "windows written twice": ({"windows": [4]}, as_it_is, {"windows": [4, 4]}, 0, r"\[4\] -> \[4, 4\]"),
    "one of four experts": ({}, as_it_is, {"num_experts": 4}, 1e-5, "every expert is the MLP"),
    "two of four experts": ({}, as_it_is, EXPERTS, 1e-5, "add up to 1"),
    "all experts": ({}, as_it_is, {"num_experts": 3, "experts_per_token": 3}, 1e-5, "add up to 1"),
    "experts of swiglu": ({"activation": "swiglu", "bias": False}, as_it_is, EXPERTS, 1e-5, "every expert is the MLP"),
    "equal experts as one": (
        EXPERTS, equal_experts, {"num_experts": 1, "experts_per_token": 1}, 1e-5, "all experts were equal",
    ),
    "more of the equal experts": (EXPERTS, equal_experts, {"experts_per_token": 3}, 1e-5, "all experts are equal"),
    "a longer table": ({}, as_it_is, {"max_seq_len": 40}, 0, "for texts of up to 16 tokens; .* repeat the table"),
    "a shorter table": ({"max_seq_len": 20}, as_it_is, {"max_seq_len": 16}, 0, "of up to 16 tokens; .* dropped"),
    "rope goes on": (ROPE, as_it_is, {"max_seq_len": 40}, 0, "of up to 16 tokens.* not trained beyond"),
    "rope goes less far": (ROPE | {"max_seq_len": 20}, as_it_is, {"max_seq_len": 16}, 0, "of up to 16 tokens"),
    "ntk goes on": (
        ROPE | {"rope_scaling": "ntk", "rope_factor": 4.0}, as_it_is, {"max_seq_len": 40}, 0, "of up to 16 tokens",
    ),
    "biases of 0": ({"bias": False}, as_it_is, {"bias": True}, 0, "all biases are 0"),
    "biases of 0 for experts": ({"bias": False} | EXPERTS, as_it_is, {"bias": True}, 0, "all biases are 0"),
    "biases of 0 beside rmsnorm": ({"bias": False, "norm": "rmsnorm"}, as_it_is, {"bias": True}, 0, "biases are 0"),
    "no biases": ({}, no_biases, {"bias": False}, 1e-6, "all biases were 0"),
    "a head of its own": ({}, as_it_is, {"tie_head": False}, 0, "copy of the token embedding"),
    "a tied head": ({"tie_head": False}, head_is_embedding, {"tie_head": True}, 0, "equal to the token embedding"),
    "rope's base without rope": ({}, as_it_is, {"rope_base": 500.0}, 0, "nothing about a model with learned positions"),
    "dropout": ({}, as_it_is, {"dropout": 0.5}, 0, "nothing about a model that is trained"),
    "zero_init": ({}, as_it_is, {"zero_init": True}, 0, "nothing about a model that is trained"),
}  # fmt: skip
"""Name: the source, what is prepared in it, the changes, how near, and words of what is said."""

APPROXIMATE: dict[str, tuple[dict[str, Any], Prepare, dict[str, Any], str]] = {
    "kv heads pooled": ({}, as_it_is, {"num_kv_heads": 2}, "num_kv_heads 4 -> 2: .* the mean of 2"),
    "kv heads that are equal in turn": ({}, equal_neighbours_but_in_turn, {"num_kv_heads": 2}, "the mean of 2"),
    "kv heads pooled into one": ({"num_kv_heads": 2}, as_it_is, {"num_kv_heads": 1}, "2 -> 1: .* the mean of 2"),
    "rope for a table": ({}, as_it_is, ROPE, "position learned -> rope: .* table of positions is dropped"),
    "a narrow window": ({}, as_it_is, {"windows": [4, None]}, r"windows null -> \[4, null\]: .* layer 0 see more or"),
    "narrow windows": ({}, as_it_is, {"windows": [15]}, "tokens of 2 layers see"),
    "wider windows": ({"windows": [3]}, as_it_is, {"windows": [9]}, r"\[3\] -> \[9\]"),
    "no windows": ({"windows": [3, 5]}, as_it_is, {"windows": None}, r"\[3, 5\] -> null"),
    "windows in another order": ({"windows": [3, None]}, as_it_is, {"windows": [None, 3]}, "2 layers"),
    "more experts a token": (EXPERTS, as_it_is, {"experts_per_token": 3}, "experts_per_token 2 -> 3"),
    "fewer experts a token": (EXPERTS, as_it_is, {"experts_per_token": 1}, "experts_per_token 2 -> 1"),
    "rmsnorm": ({}, as_it_is, {"norm": "rmsnorm"}, "norm layernorm -> rmsnorm: .* does not centre"),
    "rmsnorm without biases": ({}, no_biases, {"norm": "rmsnorm"}, "does not centre"),
    "layernorm": ({"norm": "rmsnorm"}, as_it_is, {"norm": "layernorm"}, "LayerNorm centres what RMSNorm did not"),
    "the exact gelu": ({}, as_it_is, {"activation": "gelu"}, "gelu_tanh -> gelu: .* another function"),
    "relu2": ({}, as_it_is, {"activation": "relu2"}, "another function"),
    "qk_norm": ({}, as_it_is, {"qk_norm": True}, "qk_norm false -> true: .* another length"),
    "no qk_norm": ({"qk_norm": True}, as_it_is, {"qk_norm": False}, "another length"),
    "softcap": ({}, as_it_is, {"logit_softcap": 3}, "logit_softcap null -> 3.0: .* bent"),
    "rope's base": (ROPE, as_it_is, {"rope_base": 50.0}, "rope_base 10000.0 -> 50.0: .* other angles"),
    "linear": (ROPE, as_it_is, {"rope_scaling": "linear", "rope_factor": 2.0}, "rope_scaling null -> linear"),
    "ntk": (ROPE, as_it_is, {"rope_scaling": "ntk", "rope_factor": 8.0}, "rope_factor 1.0 -> 8.0"),
    "a longer yarn": (YARN, as_it_is, {"max_seq_len": 1024}, r"max_seq_len 256 -> 1024: .* \(64 -> 256\)"),
    "rope stretched": (
        ROPE, as_it_is, {"max_seq_len": 64, "rope_scaling": "linear", "rope_factor": 4}, "positions are told in another way",
    ),
}  # fmt: skip
"""Name: the source, what is prepared in it, the changes, and words of what is said."""


@pytest.mark.parametrize(("variant", "prepare", "changes", "within", "words"), EXACT.values(), ids=EXACT)
def test_what_is_said_to_be_exact_is(
    variant: dict[str, Any], prepare: Prepare, changes: dict[str, Any], within: float, words: str
) -> None:
    model = build(SMALL | variant)
    prepare(model)
    found = changed(model, **changes)
    assert found.model.config != model.config and not found.model.training
    assert not found.approximate and [sentence.split()[0] for sentence in found.exact] == [
        key for key in CHANGES if key in changes
    ]
    assert any_says(words, found.exact)
    assert_same(logits(found.model), logits(model), within=within)
    with torch.no_grad():
        found.model.final_norm.weight[0] += 0.1
    assert_differ(logits(found.model), logits(model), by=0.01, what="one number moved by 0.1")


@pytest.mark.parametrize(("variant", "prepare", "changes", "words"), APPROXIMATE.values(), ids=APPROXIMATE)
def test_what_is_said_to_be_a_start_is_another_function(
    variant: dict[str, Any], prepare: Prepare, changes: dict[str, Any], words: str
) -> None:
    model = build(SMALL | variant)
    prepare(model)
    found = changed(model, **changes)
    assert not found.exact and len(found.approximate) == len(changes)
    assert any_says(words, found.approximate)
    # The two forms of GELU are 1e-3 apart at most; whatever else is changed shows by far more.
    assert_differ(
        logits(found.model), logits(model), by=1e-4 if changes == {"activation": "gelu"} else 0.01, what=words
    )
    text = tokens(1, 8)
    assert_same(found.model(text), gpt2_logits(found.model.state_dict(), found.model.config, text), within=1e-4)


def any_says(words: str, sentences: list[str]) -> bool:
    """Whether a sentence has these words, and each is one: a line that ends."""
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)
    return any(re.search(words, sentence) for sentence in sentences)


# --- Every weight is accounted for, and the source stays as it is ------------------------------------------------------


CASES = {name: case[:3] for table in (EXACT, APPROXIMATE) for name, case in table.items()}


@pytest.mark.parametrize(("variant", "prepare", "changes"), CASES.values(), ids=CASES)
def test_every_weight_is_accounted_for_and_the_source_stays_as_it_is(
    variant: dict[str, Any], prepare: Prepare, changes: dict[str, Any]
) -> None:
    model = build(SMALL | variant)
    prepare(model)
    before, config = hashed(model), model.config
    found = changed(model, **changes)
    assert hashed(model) == before and model.config == config and model.training
    theirs, ours = dict(model.named_parameters()), dict(found.model.named_parameters())
    assert not {t.data_ptr() for t in theirs.values()} & {t.data_ptr() for t in ours.values()}
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in ours.values())
    cut, missing, left_over = (
        [entry.split(" (")[0] for entry in entries]
        for entries in (found.map.cut, found.map.missing, found.map.left_over)
    )
    assert sorted([*found.map.loaded, *cut, *missing]) == sorted(ours) and not found.map.transposed
    assert all(
        ours[name].numpy(force=True).tobytes() == theirs[name].numpy(force=True).tobytes() for name in found.map.loaded
    )
    assert not set(left_over) & set(ours) and {*theirs} <= {*found.map.loaded, *cut, *missing, *left_over}
    assert all(ours[name].numel() < theirs[name].numel() for name in cut)
    assert all(name not in theirs or ours[name].numel() > theirs[name].numel() for name in missing)
    assert all(entry.endswith(")") for entry in (*found.map.cut, *found.map.missing, *found.map.left_over))


def test_what_is_dropped_cut_and_made_is_said_with_the_reason() -> None:
    found = changed(build(SMALL), position="rope", norm="rmsnorm", num_kv_heads=2, num_experts=3, tie_head=False).map
    assert "position_embedding.weight (RoPE needs no table)" in found.left_over
    assert "final_norm.bias (RMSNorm has no bias)" in found.left_over and len(found.left_over) == 6
    assert "blocks.1.attn.qkv_proj.bias (4 KV heads pooled into 2, the mean of each 2)" in found.cut
    assert "blocks.0.mlp.router.weight (drawn from N(0, 0.02))" in found.missing
    assert "blocks.0.mlp.up_proj.weight (3 copies of the MLP's, one an expert)" in found.missing
    assert "head.weight (a copy of the token embedding)" in found.missing
    assert changed(build(SMALL), max_seq_len=40).map.missing == [
        "position_embedding.weight (16 rows, repeated from the first on)"
    ]
    assert changed(build(SMALL), max_seq_len=5).map.cut == ["position_embedding.weight (the last 11 of 16 rows)"]
    assert "final_norm.bias (zeros)" in changed(build(SMALL | {"norm": "rmsnorm"}), norm="layernorm").map.missing


def test_every_field_is_either_changed_or_fixed() -> None:
    assert {field.name for field in dataclasses.fields(GPT2Config)} == {*CHANGES, *FIXED} - {"head_dim"}


# --- Key and value heads: against loops over numbers -------------------------------------------------------------------


def pooled_slowly(model: GPT2, layer: int, kind: str, new: int, member: Callable[[int, int, int], int]) -> list[Tensor]:
    """The rows of queries, keys and values with `new` KV heads; `member(g, i, size)` is the i-th head of group g."""
    queries, *keys_and_values = heads_of(model, layer, kind)
    out = list(queries)
    for heads in keys_and_values:
        size = len(heads) // new
        for group in range(new):
            members = [heads[member(group, i, size)].flatten().tolist() for i in range(size)]
            means = [math.fsum(numbers) / size for numbers in zip(*members, strict=True)]
            out.append(torch.tensor(means, dtype=torch.float32).view_as(heads[0]))
    return out


@pytest.mark.parametrize(("old", "new"), [(6, 3), (6, 2), (6, 1), (3, 1)])
def test_kv_heads_are_pooled_in_consecutive_groups(old: int, new: int) -> None:
    model = build(SMALL | {"embed_dim": 48, "num_heads": 6, "num_kv_heads": old})
    found = changed(model, num_kv_heads=new).model
    for layer in (0, 1):
        for kind in ("weight", "bias"):
            ours = torch.cat([head for heads in heads_of(found, layer, kind) for head in heads])
            theirs = torch.cat(pooled_slowly(model, layer, kind, new, lambda g, i, size: g * size + i))
            assert_same(ours, theirs, within=0)
            if new > 1:
                wrong = torch.cat(pooled_slowly(model, layer, kind, new, lambda g, i, size: i * new + g))
                assert_differ(ours, wrong, by=0.1, what="heads grouped in turn")


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_kv_heads_that_were_repeated_are_pooled_back_to_the_byte(kv_heads: int) -> None:
    model = build(SMALL | {"embed_dim": 48, "num_heads": 6, "num_kv_heads": kv_heads})
    with torch.no_grad():
        model.blocks[0].attn.qkv_proj.bias[-3:] = -0.0
    repeated = changed(model, num_kv_heads=6)
    back = changed(repeated.model, num_kv_heads=kv_heads)
    assert hashed(back.model) == hashed(model) != hashed(repeated.model) and back.model.config == model.config
    assert "were equal" in back.exact[0] and not back.approximate


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("head", [-8, -1], ids=["key", "value"])
def test_one_number_of_one_head_is_enough_to_be_no_longer_exact(kind: str, head: int) -> None:
    model = build(SMALL)
    equal_pairs(model)
    assert not changed(model, num_kv_heads=2).approximate
    with torch.no_grad():
        getattr(model.blocks[0].attn.qkv_proj, kind).view(12, 8, -1)[head, 3, 0] += 1e-3
    found = changed(model, num_kv_heads=2)
    assert found.approximate and not found.exact


# --- Experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_upcycled_experts_are_the_mlp_and_their_routers_are_drawn(experts_per_token: int) -> None:
    model, changes = build(SHAPE), {"num_experts": 4, "experts_per_token": experts_per_token}
    found = changed(model, **changes).model
    routers = torch.stack([block.mlp.router.weight.detach() for block in found.blocks])
    assert 0.015 < routers.std() < 0.025 and len(routers.flatten().unique()) == 2 * 4 * 32
    for block, dense in zip(found.blocks, model.blocks, strict=True):
        for projection in ("up_proj", "down_proj"):
            for kind in ("weight", "bias"):
                copies = getattr(getattr(block.mlp, projection), kind)
                assert len(copies) == 4
                for copy in copies:
                    assert_same(copy, getattr(getattr(dense.mlp, projection), kind), within=0)
    routing = Routing()
    with torch.no_grad():
        found(tokens(1, 256), routing=routing)
    assert all((counts > 0).all() and counts.sum() == 256 * experts_per_token for counts in routing.counts)
    assert hashed(found) == hashed(changed(model, **changes).model)
    assert hashed(found) != hashed(convert(model, changes, generator(1)).model)


@pytest.mark.parametrize("name", ["up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"])
def test_one_number_of_one_expert_is_enough_to_refuse(name: str) -> None:
    model, dense = build(SMALL | EXPERTS), {"num_experts": 1, "experts_per_token": 1}
    equal_experts(model)
    assert changed(model, **dense).model.config.num_experts == 1
    with torch.no_grad():
        model.get_parameter(f"blocks.0.mlp.{name}")[2].flatten()[-1] += 1e-3
    with pytest.raises(ConfigError, match="the experts differ"):
        changed(model, **dense)


# --- Context ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [5, 17, 32, 50])
def test_a_longer_table_repeats_the_rows_from_the_first_on(new: int) -> None:
    model = build(SMALL)
    table, old = changed(model, max_seq_len=new).model.position_embedding.weight, model.position_embedding.weight
    expected = []
    while len(expected) < new:
        expected += list(old.unbind())
    assert_same(table, torch.stack(expected[:new]), within=0)
    if new > 16:
        backwards = torch.stack([old[min(i, 31 - i) % 16] for i in range(new)])
        assert_differ(table, backwards, by=0.1, what="the table backwards")


@pytest.mark.parametrize("variant", [{}, ROPE], ids=["learned", "rope"])
@torch.no_grad()
def test_beyond_the_old_length_a_longer_context_is_read(variant: dict[str, Any]) -> None:
    model = build(SMALL | variant)
    longer = changed(model, max_seq_len=48).model
    text = tokens(1, 48)
    assert_same(longer(text)[:, :16], model(text[:, :16]), within=1e-5)
    assert_same(longer(text), gpt2_logits(longer.state_dict(), longer.config, text), within=1e-4)
    assert_differ(longer(text)[:, 16:32], longer(text[:, 16:])[:, :16], by=0.1, what="without the tokens before")


# --- Together ---------------------------------------------------------------------------------------------------------


MODERN: dict[str, Any] = {
    "position": "rope", "num_kv_heads": 2, "windows": [5, None], "norm": "rmsnorm", "qk_norm": True, "num_experts": 4,
    "experts_per_token": 2, "activation": "relu2", "tie_head": False, "logit_softcap": 15.0, "max_seq_len": 64,
    "rope_scaling": "yarn", "rope_factor": 4.0, "rope_base": 100.0,
}  # fmt: skip


def test_all_parts_together_are_the_reference_and_learn() -> None:
    found = changed(build(SMALL), **MODERN)
    model, text = found.model, tokens(2, 10)
    assert len(found.exact) + len(found.approximate) == len(MODERN)
    assert_same(model(text), gpt2_logits(model.state_dict(), model.config, text), within=1e-5)
    with torch.no_grad():  # experts that are copies hide which of them is asked
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if ".mlp." in name else 0.0)
    assert_same(model(text), gpt2_logits(model.state_dict(), model.config, text), within=1e-5)
    for fault, rules in planted_faults(model.config).items():
        assert_differ(model(text), gpt2_logits(model.state_dict(), model.config, text, rules), by=1e-3, what=fault)
    model = changed(build(SMALL), **MODERN).model
    losses, optimizer = [], torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        routing = Routing()
        loss = model.train()(tokens(4, 64), tokens(4, 64, seed=2), routing=routing).mean()
        (loss + 0.01 * routing.balance_loss).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all(block.mlp.router.weight.grad.any() for block in model.blocks)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.1, losses


def any_of(menu: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in menu.items()})


MENU: dict[str, list[Any]] = {
    "position": ["learned", "rope"], "num_kv_heads": [1, 2, 4], "windows": [None, [3], [None, 6], [40]],
    "norm": ["layernorm", "rmsnorm"], "bias": [True, False], "num_experts": [1, 3], "max_seq_len": [9, 16, 30],
    "tie_head": [True, False], "activation": ["gelu", "gelu_tanh"], "qk_norm": [True, False], "dropout": [0.0, 0.3],
}  # fmt: skip


@settings(max_examples=60)
@given(variant=any_of(MENU), changes=any_of(MENU), plain=st.booleans())
def test_whatever_is_changed_together_it_is_what_is_said(
    variant: dict[str, Any], changes: dict[str, Any], plain: bool
) -> None:
    model = build(SMALL | variant).eval()
    if plain:
        no_biases(model)
    before, after = model.config, as_config(model, **changes)
    new = {key for key in changes if getattr(before, key) != getattr(after, key)}
    impossible = {
        "nothing to convert": not new,
        "RoPE holds nothing": "position" in new and after.position == "learned",
        "biases are not 0": "bias" in new and not after.bias and not plain,
        "the experts differ": "num_experts" in new and after.num_experts == 1,
        "the head is not the token embedding": "tie_head" in new and after.tie_head,
    }
    sentences = [sentence for sentence, is_so in impossible.items() if is_so]
    before_bytes = hashed(model)
    if sentences:
        with pytest.raises(ConfigError, match="|".join(sentences)):
            changed(model, **changes)
        assert hashed(model) == before_bytes
        return
    found = changed(model, **changes)
    assert hashed(model) == before_bytes
    assert found.model.config == after
    assert {sentence.split()[0] for sentence in (*found.exact, *found.approximate)} == new
    if not found.approximate:
        assert_same(logits(found.model, 9), logits(model, 9), within=1e-5)
    text = tokens(1, 6)
    assert_same(found.model(text), gpt2_logits(found.model.state_dict(), found.model.config, text), within=1e-4)


def as_config(model: GPT2, **changes: Any) -> GPT2Config:
    return GPT2Config(**dataclasses.asdict(model.config) | changes)


# --- Refused ----------------------------------------------------------------------------------------------------------


SIX = {"embed_dim": 48, "num_heads": 6, "num_kv_heads": 3}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "nothing": ({}, {}, "nothing to convert: no change was given", "one of position, norm, bias, num_kv_heads, .*dropout"),
    "what it is": ({}, {"num_kv_heads": 4, "windows": None}, "no value differs from the model's", "another value"),
    "a misspelt key": ({}, {"window": [4]}, "unknown key window", "perhaps windows"),
    "an unknown key": ({}, {"colour": 1, "preset": "124M"}, "unknown key colour, preset", "one of position, norm"),
    "another vocabulary": ({}, {"vocab_size": 62}, "another size: vocab_size is 61, not 62", "leave it out; `gpt2lab train`"),
    "another width": ({}, {"embed_dim": 64}, "embed_dim is 32, not 64", "leave it out"),
    "other heads": ({}, {"num_heads": 8}, "num_heads is 4, not 8", "leave it out"),
    "other heads' width": ({}, {"head_dim": 16}, "head_dim is 8, not 16", "leave it out"),
    "another depth": ({}, {"num_layers": 3}, "num_layers is 2, not 3", "leave it out"),
    "wider experts": ({}, {"ff_hidden_dim": 64, "num_layers": 1}, "ff_hidden_dim is 48, not 64; num_layers is 2", "leave"),
    "kv heads that do not divide": ({}, {"num_kv_heads": 3}, "--num-kv-heads.*num_kv_heads 3 does not divide num_heads 4", ""),
    "kv heads in neither way": (
        SIX, {"num_kv_heads": 2}, r"\(num_kv_heads 3 -> 2\): 3 heads can be neither pooled nor repeated into 2", "one of 1, 6",
    ),
    "no kv heads": ({}, {"num_kv_heads": 0}, "num_kv_heads should be greater than or equal to 1, not 0", ""),
    "true kv heads": ({}, {"num_kv_heads": True}, "num_kv_heads should not be True", ""),
    "another kind of positions": ({}, {"position": "alibi"}, "position should be 'learned' or 'rope', not 'alibi'", ""),
    "too many windows": ({}, {"windows": [1, 2, 3]}, "windows has 3 entries for num_layers 2", ""),
    "scaling without rope": ({}, {"rope_scaling": "yarn", "rope_factor": 2}, "needs position rope, not learned", ""),
    "an odd head": ({"embed_dim": 12}, ROPE, "rope turns pairs, but embed_dim 12 / num_heads 4 = 3 is odd", ""),
    "a table for rope": (ROPE, {"position": "learned"}, r"\(position rope -> learned\): RoPE holds nothing", "keep position"),
    "experts that differ": (
        EXPERTS, {"num_experts": 1, "experts_per_token": 1}, "the experts differ, and no one MLP", "keep num_experts",
    ),
    "more experts": (EXPERTS, {"num_experts": 8}, r"\(num_experts 4 -> 8\): copies of experts", "keep num_experts 4"),
    "fewer experts than are chosen": (
        EXPERTS, {"num_experts": 1}, "experts_per_token 2 is more than num_experts 1", "",
    ),
    "biases that were learned": (
        {}, {"bias": False}, "13 of 13 biases are not 0, the first of them blocks.0.attn_norm.bias", "keep bias true",
    ),
    "a head that was learned": (
        {"tie_head": False}, {"tie_head": True}, "the head is not the token embedding", "keep tie_head false",
    ),
    "to swiglu": ({}, {"activation": "swiglu"}, "gelu_tanh -> swiglu.*three matrices", "keep activation gelu_tanh"),
    "from swiglu": ({"activation": "swiglu"}, {"activation": "gelu"}, "three matrices", "keep activation swiglu"),
    "one of several": (ROPE, {"num_kv_heads": 2, "position": "learned"}, "RoPE holds nothing", "keep position rope"),
}  # fmt: skip


@pytest.mark.parametrize(("variant", "changes", "sentence", "fix"), REFUSED.values(), ids=REFUSED)
def test_refused(variant: dict[str, Any], changes: dict[str, Any], sentence: str, fix: str) -> None:
    model = build(SMALL | variant)
    before = hashed(model)
    with pytest.raises(ConfigError, match=f"{sentence}.*Fix: .*{fix}") as caught:
        changed(model, **changes)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and hashed(model) == before


def test_the_counts_that_a_refusal_names_work() -> None:
    model = build(SMALL | SIX)
    assert [changed(model, num_kv_heads=n).model.config.num_kv_heads for n in (1, 6)] == [1, 6]


def test_one_bias_that_is_not_0_is_enough_to_refuse() -> None:
    model = build(SMALL)
    no_biases(model)
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.bias[3] = 1e-30
    with pytest.raises(ConfigError, match=r"1 of 13 biases are not 0, the first of them blocks.1.mlp.down_proj.bias"):
        changed(model, bias=False)


# --- The difference ---------------------------------------------------------------------------------------------------


def test_the_largest_difference_is_that_of_the_logits() -> None:
    model = build(SHAPE | {"max_seq_len": 1100}).eval()
    # The window differs from the 901st token on.
    shorter, narrower = changed(model, max_seq_len=20).model, changed(model, windows=[900]).model
    assert max_logit_difference(model, shorter, generator()) == 0
    text = torch.randint(61, (1, 1024), generator=generator(5))
    with torch.no_grad():
        expected = max(
            abs(a - b) for a, b in zip(*(m(text).flatten().tolist() for m in (model, narrower)), strict=True)
        )
    assert max_logit_difference(model, narrower, generator(5)) == pytest.approx(expected, abs=1e-6)
    assert max_logit_difference(narrower, model, generator(5)) == max_logit_difference(model, narrower, generator(5))
    assert max_logit_difference(model, narrower, generator(6)) != pytest.approx(expected, abs=1e-6) and expected > 0.01
