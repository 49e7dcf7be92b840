"""Experts by themselves: one of them is the MLP, several are a loop over tokens, and only the chosen ones work."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.config import GPT2Config
from gpt2lab.model.activation import ACTIVATIONS
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.mlp import MLP
from gpt2lab.model.moe import GroupedLinear, MoE, Routing
from tests.model.test_variants import EXPERTS, PARTS, SHAPE, build, tokens
from tests.reference import RULES, Rules, activate, assert_differ, assert_same, gpt2_logits, planted_faults

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def loud(module: nn.Module) -> Any:
    """Weights so large that every part shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.4)
    return module


def experts(embed: int, hidden: int, count: int, chosen: int, activation: str = "gelu_tanh", **how: Any) -> MoE:
    """In float64, where only the order of sums may differ."""
    return loud(MoE(embed, hidden, count, chosen, activation=ACTIVATIONS[activation], **how).double())


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def slowly(
    weights: Mapping[str, Tensor], x: Tensor, chosen: int, activation: str = "gelu_tanh", rules: Rules = RULES
) -> Tensor:
    """One token after the other, each by the experts it chose."""

    def expert(token: Tensor, e: int) -> Tensor:
        up, down = (
            (weights[f"{name}.weight"][e], weights[f"{name}.bias"][e] if f"{name}.bias" in weights else 0.0)
            for name in ("up_proj", "down_proj")
        )
        return down[0] @ activate(up[0] @ token + up[1], activation, rules) + down[1]

    rows = []
    for token in x.flatten(0, 1):
        logits = weights["router.weight"] @ token
        best = rules.chosen(logits.tolist(), chosen)
        rows.append(sum(share * expert(token, e) for share, e in zip(rules.share(logits, best), best, strict=True)))
    return torch.stack(rows).view(x.shape)


def gradients(out: Tensor, direction: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, direction, retain_graph=True)


# --- One expert is the MLP --------------------------------------------------------------------------------------------


def one_and_mlp(embed: int, hidden: int, **how: Any) -> tuple[MoE, MLP]:
    """One expert, and an MLP with the same weights."""
    moe, mlp = loud(MoE(embed, hidden, 1, 1, **how)), MLP(embed, hidden, **how)
    mlp.load_state_dict({name: tensor[0] for name, tensor in moe.state_dict().items() if not name.startswith("router")})
    return moe, mlp


@each_activation
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["float64", "float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(("batch", "time", "embed", "hidden"), [(1, 1, 8, 12), (2, 5, 32, 48), (3, 33, 20, 7)])
def test_one_expert_is_the_mlp_to_the_bit(
    batch: int, time: int, embed: int, hidden: int, how: str, bias: bool, activation: str
) -> None:
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    moe, mlp = (part.to(dtype) for part in one_and_mlp(embed, hidden, bias=bias, activation=ACTIVATIONS[activation]))
    x = torch.randn(batch, time, embed, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        ours, theirs = moe(x), mlp(x)
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if how == "autocast" else dtype)
    assert torch.equal(ours, theirs) and ours.any()

    direction, names = torch.randn_like(ours), [name for name, _ in mlp.named_parameters()]
    our_weights, their_weights = ([module.get_parameter(name) for name in names] for module in (moe, mlp))
    for name, our, their in zip(
        ["x", *names],
        gradients(ours, direction, [x, *our_weights]),
        gradients(theirs, direction, [x, *their_weights]),
        strict=True,
    ):
        assert torch.equal(our.view(their.shape), their) and their.any(), f"gradient of {name}"
    [router] = gradients(ours, direction, [moe.router.weight])
    assert not router.any(), "a router with one expert has nothing to decide"

    with torch.no_grad():
        mlp.down_proj.weight[0] += 0.125
    assert_differ(moe(x), mlp(x), by=1e-3, what="one row of one matrix")


def test_a_model_with_one_expert_is_the_dense_model() -> None:
    """It is built without a router. And with one, in place of each MLP, it says the same to the bit."""
    dense, one, ids, targets = GPT2(**SHAPE), build(SHAPE | {"num_experts": 1}), tokens(2, 20), tokens(2, 20, seed=2)
    assert all(type(block.mlp) is MLP for block in one.blocks)
    assert str(one) == str(dense) and one.state_dict().keys() == dense.state_dict().keys()
    dense.load_state_dict(one.state_dict())
    assert torch.equal(one(ids), dense(ids))

    for block in one.blocks:
        moe = loud(MoE(32, 48, 1, 1))
        weights = {name: tensor[None] for name, tensor in block.mlp.state_dict().items()}
        moe.load_state_dict(moe.state_dict() | weights)
        block.mlp = moe
    losses = one(ids, targets)
    assert torch.equal(losses, dense(ids, targets))
    losses.mean().backward()
    dense(ids, targets).mean().backward()
    for name, parameter in dense.named_parameters():
        assert torch.equal(one.get_parameter(name).grad.view(parameter.shape), parameter.grad), f"gradient of {name}"
    assert not torch.equal(losses, build(SHAPE, seed=1)(ids, targets))


# --- Several experts are a loop over the tokens -----------------------------------------------------------------------


@each_activation
@pytest.mark.parametrize("bias", [True, False])
@settings(max_examples=12)
@given(time=st.integers(1, 9), count=st.integers(1, 6), chosen=st.integers(1, 6))
def test_experts_are_the_loop(time: int, count: int, chosen: int, bias: bool, activation: str) -> None:
    chosen = min(count, chosen)
    moe, x, routing = experts(8, 6, count, chosen, activation, bias=bias), numbers(2, time, 8), Routing()
    out = moe(x, routing)
    weights = dict(moe.named_parameters())
    truth = slowly(weights, x, chosen, activation)
    assert_same(out, truth, within=1e-12)
    direction = torch.randn_like(out)
    for name, ours, theirs in zip(
        weights,
        gradients(out, direction, list(weights.values())),
        gradients(truth, direction, list(weights.values())),
        strict=True,
    ):
        assert_same(ours, theirs, within=1e-11, what=f"gradient of {name}")
    [counts] = routing.counts
    assert counts.shape == (count,) and counts.sum() == 2 * time * chosen and counts.max() <= 2 * time


@pytest.mark.parametrize(("activation", "chosen"), [("gelu_tanh", 1), ("swiglu", 2), ("relu2", 3)])
def test_experts_are_not_the_loop_with_a_planted_fault(activation: str, chosen: int) -> None:
    moe, x = experts(8, 6, 4, chosen, activation), numbers(2, 9, 8)
    config = GPT2Config(num_experts=4, experts_per_token=chosen, activation=activation)
    found = {fault: rules for fault, rules in planted_faults(config).items() if "expert" in fault or "gate" in fault}
    assert len(found) >= 2
    for fault, rules in found.items():
        assert_differ(moe(x), slowly(moe.state_dict(), x, chosen, activation, rules), by=1e-2, what=fault)
    assert_differ(moe(x), slowly(moe.state_dict(), x, chosen % 4 + 1, activation), by=1e-2, what="one expert more")


def all_to(expert: int, moe: MoE) -> MoE:
    """Every token, as long as its first number is 1, chooses this expert, and then those that follow it."""
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, 0] = torch.arange(moe.num_experts, 0, -1).roll(expert)
    return moe


@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("expert", [0, 2, 3])
def test_an_expert_that_gets_every_token_processes_every_token(expert: int, chosen: int) -> None:
    """None has a capacity. The others get nothing, which is no special case."""
    moe, x, routing = all_to(expert, experts(8, 6, 4, chosen)), numbers(3, 50, 8), Routing()
    x[..., 0] = 1
    out = moe(x, routing)
    expected = [150 if (e - expert) % 4 < chosen else 0 for e in range(4)]
    assert routing.counts[0].tolist() == expected and out.any(dim=-1).all()
    assert_same(out, slowly(moe.state_dict(), x, chosen), within=1e-12)
    assert_differ(out, slowly(all_to(expert + 1, moe).state_dict(), x, chosen), by=1e-2, what="another expert")
    for weight in (moe.up_proj.weight, moe.down_proj.weight, moe.up_proj.bias, moe.down_proj.bias):
        [gradient] = gradients(out, torch.randn_like(out), [weight])
        assert gradient.flatten(1).any(dim=1).tolist() == [count > 0 for count in expected]


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_model_whose_tokens_all_choose_one_expert_is_the_reference(chosen: int) -> None:
    model, ids, routing = build(SHAPE | EXPERTS | {"experts_per_token": chosen}), tokens(2, 30), Routing()
    with torch.no_grad():
        for block in model.blocks:  # the first number of what a router sees is 1
            block.mlp_norm.weight[0], block.mlp_norm.bias[0] = 0, 1
            all_to(1, block.mlp)
    logits = model(ids, routing=routing)
    assert torch.stack(routing.counts)[:, 1].tolist() == [60, 60]
    assert_same(logits, gpt2_logits(model.state_dict(), model.config, ids), within=1e-5)
    all_to(2, model.blocks[1].mlp)
    assert_differ(model(ids), logits, by=1e-2, what="another expert")


def test_no_token_at_all_is_routed() -> None:
    moe, routing = experts(8, 6, 4, 2), Routing()
    assert moe(numbers(0, 5, 8), routing).shape == (0, 5, 8)
    assert routing.counts[0].tolist() == [0, 0, 0, 0]


# --- Only the work that was chosen is done ----------------------------------------------------------------------------


def flops(moe: MoE, x: Tensor, *, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = moe(x)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("count", "chosen"), [(1, 1), (4, 1), (4, 2), (16, 2), (16, 16)])
def test_only_the_chosen_experts_work(count: int, chosen: int, activation: str) -> None:
    rows: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda module, inputs: rows.update({name: len(inputs[0])})

    moe, time = experts(8, 12, count, chosen, activation), 35
    for name in ("up_proj", "down_proj"):
        moe.get_submodule(name).register_forward_pre_hook(note(name))
    x = numbers(2, time, 8).requires_grad_()
    forward = flops(moe, x)
    assert rows == dict.fromkeys(("up_proj", "down_proj"), 2 * time * chosen)
    router, one_expert = 8 * count, 12 * 8 * (ACTIVATIONS[activation].inputs + 1)
    assert forward == 2 * 2 * time * (router + chosen * one_expert)
    assert flops(moe, x, backward=True) == 3 * forward
    if chosen < count:
        assert forward < 2 * 2 * time * (router + count * one_expert)


def test_a_token_does_not_depend_on_the_others() -> None:
    """... as it would if experts had a capacity: not on how many there are, their order, or what they say."""
    moe, x = experts(8, 6, 4, 2), numbers(2, 20, 8)
    truth = moe(x)
    for row in range(2):
        for t in range(20):
            assert_same(moe(x[row : row + 1, t : t + 1])[0, 0], truth[row, t], within=1e-13)
    order = torch.randperm(20)
    assert_same(moe(x[:, order]), truth[:, order], within=1e-13)
    crowd = torch.cat([x, x[:1, :1].expand(50, 20, 8)])  # fifty times as many for the experts of the first token
    assert_same(moe(crowd)[:2], truth, within=1e-13)
    assert_differ(moe(x[:, order]), truth, by=1e-2, what="another order")

    x.requires_grad_()
    out = moe(x)
    for t in (0, 7, 19):
        [gradient] = gradients(out[0, t], torch.randn(8).double(), [x])
        assert gradient.any(dim=-1).nonzero().tolist() == [[0, t]]


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_twice_is_the_same_to_the_bit(chosen: int) -> None:
    def once(seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        moe, x = loud(MoE(16, 24, 4, chosen)), torch.randn(2, 50, 16, requires_grad=True)
        routing = Routing()
        out = moe(x, routing)
        loss = out.square().sum() + routing.balance_loss + routing.z_loss
        return [out, *routing.counts, *torch.autograd.grad(loss, [x, *moe.parameters()])]

    first = once()
    assert all(map(torch.equal, first, once()))
    assert not torch.equal(first[0], once(seed=1)[0])


def test_experts_drop_what_they_say_while_training_only() -> None:
    moe, x = experts(8, 6, 4, 2, dropout=0.5), numbers(2, 200, 8)
    said = moe.eval()(x)
    dropped = moe.train()(x)
    kept = dropped != 0
    assert 0.4 < kept.double().mean().item() < 0.6
    assert_same(dropped[kept], 2 * said[kept], within=1e-13)
    assert_differ(dropped, said, by=1e-2, what="with dropout")


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="experts_per_token 3 is more than num_experts 2"):
        MoE(8, 6, 2, 3)


# --- One matrix a group of rows ---------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(0, 4), min_size=2, max_size=6), bias=st.booleans())
def test_a_grouped_layer_is_a_loop_over_its_rows(counts: list[int], bias: bool) -> None:
    layer = loud(GroupedLinear(len(counts), 5, 3, bias=bias).double())
    x = numbers(sum(counts), 5).requires_grad_()
    out = layer(x, torch.tensor(counts))
    direction, inputs = torch.randn_like(out), {"x": x, **dict(layer.named_parameters())}
    ours = dict(zip(inputs, gradients(out, direction, list(inputs.values())), strict=True))
    assert out.shape == (sum(counts), 3)
    for name in inputs.keys() - {"x"}:  # a group without rows learns nothing, and is not forgotten either
        assert ours[name].flatten(1).any(dim=1).tolist() == [count > 0 for count in counts], name
    if not any(counts):
        return

    def by_row(turned: int) -> Tensor:
        groups = [(group + turned) % len(counts) for group, count in enumerate(counts) for _ in range(count)]
        rows = [layer.weight[group] @ row for group, row in zip(groups, x, strict=True)]
        return torch.stack([row + layer.bias[group] for group, row in zip(groups, rows, strict=True)] if bias else rows)

    assert_same(out, by_row(0), within=1e-14)
    for name, theirs in zip(inputs, gradients(by_row(0), direction, list(inputs.values())), strict=True):
        assert_same(ours[name], theirs, within=1e-14, what=f"gradient of {name}")
    assert_differ(out, by_row(1), by=1e-3, what="the next group's matrix")


def test_a_grouped_layer_starts_as_gpt2_does() -> None:
    layer = GroupedLinear(4, 64, 96)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    assert GroupedLinear(4, 64, 96, bias=False).bias is None


# --- What the routers say ---------------------------------------------------------------------------------------------


def noted(logits: Tensor, counts: Sequence[int]) -> Routing:
    routing = Routing()
    routing.append(logits, torch.tensor(counts))
    return routing


@pytest.mark.parametrize("count", [2, 4, 7])
def test_the_balance_loss_is_1_when_even_and_the_number_of_experts_when_one_gets_all(count: int) -> None:
    tokens = 3 * count
    even = noted(torch.zeros(tokens, count), [3] * count)
    assert even.balance_loss.item() == pytest.approx(1, rel=1e-6)
    one = F.one_hot(torch.zeros(tokens, dtype=torch.long), count).float()
    previous = 1.0
    for certainty in (0.5, 1.0, 3.0, 30.0):
        found = noted(certainty * one, [tokens] + [0] * (count - 1)).balance_loss.item()
        assert previous < found <= count * (1 + 1e-6)
        previous = found
    assert found == pytest.approx(count, rel=1e-6)


def test_both_losses_by_hand() -> None:
    """Four tokens, two experts. Mean probabilities (3/8, 5/8), shares (1/4, 3/4)."""
    likely, unlikely = [3 / 4, 1 / 4], [1 / 4, 3 / 4]
    probabilities = torch.tensor([likely, unlikely, unlikely, unlikely], dtype=torch.float64)
    sizes = torch.tensor([1.0, 2.0, -3.0, 0.0], dtype=torch.float64)  # what logsumexp will be
    routing = noted(probabilities.log() + sizes[:, None], [1, 3])
    assert routing.balance_loss.item() == pytest.approx(2 * (1 / 4 * 3 / 8 + 3 / 4 * 5 / 8), rel=1e-12)
    assert routing.z_loss.item() == pytest.approx((1 + 4 + 9 + 0) / 4, rel=1e-12)
    assert noted(probabilities.log(), [1, 3]).z_loss.item() == pytest.approx(0, abs=1e-12)
    assert noted(probabilities.log(), [3, 1]).balance_loss.item() != pytest.approx(9 / 8, rel=0.1)
    routing.append(torch.zeros(4, 2, dtype=torch.float64), torch.tensor([4, 4]))
    assert routing.balance_loss.item() == pytest.approx((9 / 8 + 1) / 2, rel=1e-12)
    assert routing.z_loss.item() == pytest.approx((7 / 2 + math.log(2) ** 2) / 2, rel=1e-12)


@pytest.mark.parametrize("loss", ["balance_loss", "z_loss"])
def test_gradients_of_the_losses_are_finite_differences(loss: str) -> None:
    """Of the router's weights and of the tokens, with what was chosen left as it is: counting has no gradient."""
    moe, x = experts(8, 6, 4, 2), numbers(1, 9, 8).requires_grad_()

    def measure() -> Tensor:
        routing = Routing()
        moe(x, routing)
        return getattr(routing, loss)

    for tensor in (moe.router.weight, x):
        [gradient] = torch.autograd.grad(measure(), [tensor])
        assert gradient.any()
        slopes = torch.zeros_like(gradient)
        with torch.no_grad():
            for place in range(tensor.numel()):
                sides = []
                for step in (1e-6, -1e-6):
                    tensor.view(-1)[place] += step
                    sides.append(measure())
                    tensor.view(-1)[place] -= step
                slopes.view(-1)[place] = (sides[0] - sides[1]) / 2e-6
        assert_same(gradient, slopes, within=1e-8)
        assert_differ(gradient, 2 * slopes, by=1e-3, what="twice as steep")


@pytest.mark.parametrize("loss", ["balance_loss", "z_loss"])
def test_the_losses_move_routers_alone_and_the_right_way(loss: str) -> None:
    """One step against the gradient makes each smaller."""
    moe, x = loud(MoE(16, 12, 4, 1)), torch.randn(2, 40, 16)

    def measure() -> Tensor:
        routing = Routing()
        moe(x, routing)
        return getattr(routing, loss)

    before = measure()
    before.backward()
    assert [name for name, p in moe.named_parameters() if p.grad is not None] == ["router.weight"]
    with torch.no_grad():
        moe.router.weight -= 0.01 * moe.router.weight.grad
    assert measure() < before - 1e-5


WITH_EXPERTS = {
    "experts": SHAPE | EXPERTS,
    "one-of-three": SHAPE | PARTS["one-of-three-experts"],
    "all": SHAPE | PARTS["all-experts"],
    "windows": SHAPE | EXPERTS | {"windows": [3, 7], "position": "rope"},
    "modern": SHAPE | PARTS["modern"],
}
each_model = pytest.mark.parametrize("variant", WITH_EXPERTS.values(), ids=WITH_EXPERTS)


@each_model
def test_every_layer_notes_its_routing_once_and_in_order(variant: dict[str, Any]) -> None:
    model, ids, routing = build(variant), tokens(2, 21), Routing()
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        seen.append((inputs[0], module.router.weight))

    for block in model.blocks:
        block.mlp.register_forward_hook(note)
    model(ids, routing=routing)
    assert len(routing.counts) == len(routing.balance_losses) == len(routing.z_losses) == len(seen) == 2
    experts, chosen = model.config.num_experts, model.config.experts_per_token
    for layer, (x, router) in enumerate(seen):
        assert router is model.blocks[layer].mlp.router.weight
        logits = x.flatten(0, 1) @ router.T
        votes = [e for row in logits.tolist() for e in RULES.chosen(row, chosen)]
        counts = [votes.count(e) for e in range(experts)]
        assert routing.counts[layer].tolist() == counts and sum(counts) == 2 * 21 * chosen
        means = logits.softmax(-1).mean(0)
        balance = experts * sum(n / sum(counts) * mean for n, mean in zip(counts, means, strict=True))
        assert_same(routing.balance_losses[layer], balance, within=1e-5)
        assert_same(routing.z_losses[layer], logits.exp().sum(-1).log().square().mean(), within=1e-4)
    assert_same(routing.balance_loss, sum(routing.balance_losses) / 2, within=1e-6)
    assert_same(routing.z_loss, sum(routing.z_losses) / 2, within=1e-5)
    assert chosen == experts or not torch.equal(*routing.counts), "the layers cannot be told apart"
    model(ids, routing=routing)
    assert len(routing.counts) == 4  # whoever keeps one for two passes, adds them up


@each_model
def test_a_routing_changes_no_logit(variant: dict[str, Any]) -> None:
    model, ids, targets = build(variant), tokens(2, 21), tokens(2, 21, seed=2)
    assert torch.equal(model(ids, routing=Routing()), model(ids))
    assert torch.equal(model(ids, targets, routing=Routing()), model(ids, targets))
    assert not torch.equal(model(ids, routing=Routing()), model(targets))


def test_a_dense_model_has_nothing_to_note() -> None:
    model, ids, routing = build(SHAPE), tokens(1, 5), Routing()
    assert torch.equal(model(ids, routing=routing), model(ids)) and not routing.counts


@each_model
@torch.no_grad()
def test_with_a_cache_tokens_are_routed_as_in_the_full_pass(variant: dict[str, Any]) -> None:
    """The full pass of one token more has one token's choices more: those of decoding it."""
    model, ids = build(variant).double(), tokens(1, 40)

    def counts(**how: Any) -> Tensor:
        routing = Routing()
        model(**how, routing=routing)
        return torch.stack(routing.counts)

    cache, before = model.new_cache(1, 40), torch.zeros(2, model.config.num_experts, dtype=torch.long)
    choices = []
    for t in range(40):
        choices.append(counts(token_ids=ids[:, t : t + 1], cache=cache))
        full = counts(token_ids=ids[:, : t + 1])
        assert torch.equal(choices[-1], full - before), f"token {t}"
        before = full
    assert torch.equal(torch.stack(choices).sum(0), full)
    if model.config.experts_per_token < model.config.num_experts:
        assert len({tuple(choice.flatten().tolist()) for choice in choices}) > 1, "all tokens choose the same"


def test_a_router_decides_in_fp32() -> None:
    """Under autocast, and with weights in bf16: rounded there, close calls would go to another expert."""
    moe, x = loud(MoE(16, 12, 8, 2)), torch.randn(4, 1000, 16)

    def decided(moe: MoE, x: Tensor) -> Tensor:
        routing = Routing()
        moe(x, routing)
        assert routing.balance_loss.dtype == routing.z_loss.dtype == torch.float32
        return routing.counts[0]

    exact = decided(moe, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decided(moe, x), exact)
        rough = F.linear(x, moe.router.weight)
    assert rough.dtype == torch.bfloat16
    rough_counts = rough.flatten(0, 1).topk(2).indices.flatten().bincount(minlength=8)
    assert not torch.equal(rough_counts, exact), "the rounding moves no token, so the test could not have seen it"

    x = x.bfloat16()
    truth = F.linear(x.float(), moe.bfloat16().router.weight.float()).flatten(0, 1).topk(2).indices
    assert torch.equal(decided(moe, x), truth.flatten().bincount(minlength=8))
