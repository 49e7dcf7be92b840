"""Every variant of the model passes every test here: to test a new one, add a row to VARIANTS.

The table is {learned, rope} x {multi-head, grouped-query, multi-query} x {no, one, several windows} x {dense, experts} at
width 32, and a row for each part that may take the place of one of GPT-2's.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.config import GPT2_VOCAB_SIZE, PRESETS, GPT2Config
from gpt2lab.model import attention
from gpt2lab.model.attend import SMALLEST_BLOCK
from gpt2lab.model.attention import GroupQueryAttention
from gpt2lab.model.cache import ROLLBACK, Cache
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.rope import RotaryEmbedding
from tests.reference import RULES, Rules, assert_differ, assert_same, gpt2_logits, planted_faults

SHAPE = {"vocab_size": 61, "max_seq_len": 256, "embed_dim": 32, "num_heads": 4, "ff_hidden_dim": 48, "num_layers": 2}
POSITIONS = {"learned": {}, "rope": {"position": "rope"}}
HEADS = {"mha": {}, "gqa": {"num_kv_heads": 2}, "mqa": {"num_kv_heads": 1}}
WINDOWS = {
    "full": {},
    "window-5": {"windows": [5]},
    "windows-3-7": {"windows": [3, 7]},
    "window-4-full": {"windows": [4, None]},
    "window-1": {"windows": [1]},
}

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "ff_hidden_dim": 24}
PARTS: dict[str, dict[str, Any]] = {
    "rope-linear": {"position": "rope", "rope_scaling": "linear", "rope_factor": 4.0},
    "rope-ntk": {"position": "rope", "rope_scaling": "ntk", "rope_factor": 4.0},
    "rope-yarn": {"position": "rope", "rope_scaling": "yarn", "rope_factor": 4.0, "rope_base": 100.0},
    "qk-norm": {"qk_norm": True},
    "no-bias": {"bias": False},
    "gelu-exact": {"activation": "gelu"},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "rmsnorm": {"norm": "rmsnorm"},
    "softcap": {"logit_softcap": 5.0},
    "zero-init": {"zero_init": True},
    "untied": {"tie_head": False},
    "one-of-three-experts": {"num_experts": 3},
    "all-experts": {"num_experts": 3, "experts_per_token": 3},
    "modern": {
        "position": "rope", "num_kv_heads": 2, "windows": [5, None], "norm": "rmsnorm", "activation": "swiglu",
        "bias": False, "qk_norm": True, "logit_softcap": 15.0, "tie_head": False, "num_experts": 4, "experts_per_token": 2,
    },
}  # fmt: skip
"""GPT-2 with one part exchanged, and with all of them."""

VARIANTS: dict[str, dict[str, Any]] = {
    "-".join(names): SHAPE | POSITIONS[names[0]] | HEADS[names[1]] | WINDOWS[names[2]]
    for names in itertools.product(POSITIONS, HEADS, WINDOWS)
}
VARIANTS |= {
    "-".join([*names, "experts"]): SHAPE | POSITIONS[names[0]] | HEADS[names[1]] | WINDOWS[names[2]] | EXPERTS
    for names in itertools.product(POSITIONS, HEADS, ["full", "window-5", "windows-3-7"])
}
VARIANTS |= {name: SHAPE | part for name, part in PARTS.items()}
"""Name to the arguments of GPT2."""

SHORT = 12
LONG = 2 * SMALLEST_BLOCK + 19
"""Tokens enough for windowed attention to go block by block, and no whole number of blocks."""


WINDOWED = {name: variant for name, variant in VARIANTS.items() if all(variant.get("windows", [None]))}
"""The variants whose every layer has a window."""


def each(variants: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", variants.values(), ids=variants)


each_variant = each(VARIANTS)


def build(variant: dict[str, Any], seed: int = 0) -> GPT2:
    """A model with weights so large that every part of it shows in the logits: at 0.02, faults hide in the rounding."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT2(**variant, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def tokens(batch: int, time: int, *, vocab_size: int = SHAPE["vocab_size"], seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def looks_back(config: GPT2Config) -> float:
    """How many tokens before its own a logit depends on: each layer passes on what its window reaches."""
    windows = config.windows or (None,)
    layers = [windows[layer % len(windows)] for layer in range(config.num_layers)]
    return math.inf if None in layers else sum(window - 1 for window in layers)


# --- The mathematics -------------------------------------------------------------------------------------------------


@each_variant
def test_logits_are_the_reference(variant: dict[str, Any]) -> None:
    model, token_ids = build(variant), tokens(2, SHORT)
    logits = model(token_ids)
    assert_same(logits, gpt2_logits(model.state_dict(), model.config, token_ids), within=1e-5)
    for fault, rules in planted_faults(model.config).items():
        wrong = gpt2_logits(model.state_dict(), model.config, token_ids, rules)
        assert_differ(logits, wrong, by=1e-3, what=fault)


@each(WINDOWED)  # the loops are slow at this length, and say nothing new about full attention
@torch.no_grad()
def test_logits_of_a_long_text_are_the_reference(variant: dict[str, Any], in_blocks: list[int]) -> None:
    """Windowed layers go block by block here: the path that a short text does not take."""
    model, token_ids = build(variant), tokens(1, LONG)
    logits = model(token_ids)
    assert in_blocks == [block.attn.window for block in model.blocks]
    assert_same(logits, gpt2_logits(model.state_dict(), model.config, token_ids), within=1e-5)
    wrong = gpt2_logits(
        model.state_dict(), model.config, token_ids, planted_faults(model.config)["window one too wide"]
    )
    assert_differ(logits[:, SMALLEST_BLOCK:], wrong[:, SMALLEST_BLOCK:], by=1e-3, what="window one too wide")


@each_variant
def test_gradients_are_the_reference(variant: dict[str, Any]) -> None:
    model, token_ids, targets = build(variant), tokens(1, 9), tokens(1, 9, seed=2)
    model(token_ids, targets).mean().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}

    def slowly(rules: Rules = RULES) -> dict[str, Tensor]:
        weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
        logits = gpt2_logits(weights, model.config, token_ids, rules)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    theirs = slowly()
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # One expert a token weighs 1, whatever the router says: it learns from the load-balancing loss alone.
        alone = name.endswith("router.weight") and model.config.experts_per_token == 1
        assert (gradient.abs().max().item() > 1e-12) != alone, f"what flows to {name}"
        assert_same(ours[name], gradient, within=1e-4 * max(1e-6, gradient.abs().max().item()), what=name)
    fault, rules = list(planted_faults(model.config).items())[
        -1
    ]  # each of them shows in the logits, as the test above says
    wrong = slowly(rules)
    name = "blocks.0.attn.qkv_proj.weight"
    by = 0.1 * theirs[name].abs().max().item()
    assert_differ(ours[name], wrong[name], by=by, what=f"{fault}, gradient of {name}")


@each_variant
def test_loss_is_minus_the_log_of_the_target_s_probability(variant: dict[str, Any]) -> None:
    model, token_ids, targets = build(variant), tokens(2, SHORT), tokens(2, SHORT, seed=2)
    targets[0, :3] = -100
    losses = model(token_ids, targets)
    scored = targets != -100
    truth = -gpt2_logits(model.state_dict(), model.config, token_ids).log_softmax(-1)
    truth = truth.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert losses.shape == targets.shape and not losses[~scored].any()
    assert_same(losses[scored], truth[scored], within=1e-5)
    assert_differ(losses, truth, by=1e-3, what="with the targets that are not scored")


def assert_bf16_is_near(variant: dict[str, Any], how: str, device: str) -> None:
    """Read at once and with a cache, bf16 errs by little beside how much logits vary; and by much beside another text."""
    exact, rough = build(variant).double(), build(variant).to(device, torch.bfloat16 if how == "weights" else None)
    token_ids = tokens(2, LONG)

    def far(logits: Tensor, text: Tensor) -> float:
        truth = exact(text)
        return ((logits.double().cpu() - truth).abs().mean() / truth.std()).item()

    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
        cache, chunks = rough.new_cache(2, LONG), token_ids.to(device).split([90, *[1] * 7, LONG - 97], dim=1)
        at_once, cached = rough(token_ids.to(device)), torch.cat([rough(chunk, cache=cache) for chunk in chunks], dim=1)
    assert at_once.dtype == cached.dtype == torch.bfloat16
    with torch.no_grad():
        other = far(at_once, token_ids.flip(0))
        print(f"error: {far(at_once, token_ids):.3g}, cached {far(cached, token_ids):.3g}; of another text {other:.3g}")
        assert max(far(at_once, token_ids), far(cached, token_ids)) < 0.03 < 0.3 < other


@each_variant
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_is_near(variant: dict[str, Any], how: str) -> None:
    assert_bf16_is_near(variant, how, "cpu")


# --- Causality: by gradients, in every path ---------------------------------------------------------------------------


def influences(model: GPT2, token_ids: Tensor, times: Iterable[int], cache: Cache | None = None) -> Tensor:
    """|d logits[t] / d embedding[s]| for each t of `times` (rows) and every s, added up along a random direction."""
    caught: list[Tensor] = []
    hook = model.token_embedding.register_forward_hook(lambda module, inputs, output: caught.append(output))
    logits = model(token_ids, cache=cache)
    hook.remove()
    rows = [(logits[:, t] * torch.randn(logits.shape[-1]).to(logits)).sum() for t in times]
    gradients = [torch.autograd.grad(row, caught, retain_graph=True)[0] for row in rows]
    return torch.stack([gradient.abs().sum(dim=(0, 2)) for gradient in gradients]).cpu()


def assert_causal(model: GPT2, token_ids: Tensor, times: Iterable[int], cache: Cache | None = None) -> None:
    """A logit depends on its own token and on those its windows reach, and on exactly nothing else."""
    times = torch.tensor(list(times))
    distance = times[:, None] - torch.arange(token_ids.shape[1])
    expected = (distance >= 0) & (distance <= looks_back(model.config))
    found = influences(model, token_ids, times.tolist(), cache)
    for what, wrong in {"depend on": (found > 0) & ~expected, "do not depend on": ~(found > 0) & expected}.items():
        assert not wrong.any(), f"logits[t] {what} embedding[s] at t - s in {sorted(set(distance[wrong].tolist()))}"


@each_variant
def test_a_logit_depends_on_exactly_the_tokens_in_reach(variant: dict[str, Any]) -> None:
    assert_causal(build(variant), tokens(2, SHORT), range(SHORT))


@each_variant
def test_a_logit_depends_on_exactly_the_tokens_in_reach_block_by_block(variant: dict[str, Any]) -> None:
    edges = [0, 5, 62, 63, 64, 65, 70, 126, 127, 128, 129, LONG - 1]
    assert_causal(build(variant), tokens(1, LONG), edges)


@each_variant
def test_a_logit_depends_on_exactly_the_tokens_in_reach_after_a_cached_prefix(variant: dict[str, Any]) -> None:
    model, token_ids = build(variant), tokens(1, 100 + SHORT)
    cache = model.new_cache(1, 100 + SHORT)
    with torch.no_grad():
        for chunk in token_ids[:, :100].split([50, *[1] * 30, 20], dim=1):
            model(chunk, cache=cache)
    assert_causal(model, token_ids[:, 100:], range(SHORT), cache)


@each_variant
def test_the_tests_of_causality_can_fail(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask that lets one token of the future through, a window one too wide, and an attention that sees nothing."""
    model, token_ids = build(variant), tokens(2, SHORT)
    right, windowed = attention.attend, model.config.windows is not None

    def sees_the_next(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, **kwargs: Any) -> Tensor:
        k, v = F.pad(k[:, :, 1:], (0, 0, 0, 1)), F.pad(v[:, :, 1:], (0, 0, 0, 1))
        return right(q, k, v, window=window, **kwargs)

    def sees_one_more(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, **kwargs: Any) -> Tensor:
        return right(q, k, v, window=window and window + 1, **kwargs)

    def sees_nothing(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(q)

    faulty = [(sees_the_next, "depend on .*-1")]
    if windowed and looks_back(model.config) < math.inf:
        faulty += [(sees_one_more, f"depend on .*{looks_back(model.config) + 1}")]
    if looks_back(model.config):
        faulty += [(sees_nothing, "do not depend")]
    for attend, message in faulty:
        monkeypatch.setattr(attention, "attend", attend)
        with pytest.raises(AssertionError, match=message):
            assert_causal(model, token_ids, range(SHORT))


# --- The cache: in float64, where only the order of sums may differ ----------------------------------------------------


@each_variant
@torch.no_grad()
def test_prefill_then_decoding_token_by_token_is_one_forward_pass(variant: dict[str, Any]) -> None:
    model, token_ids = build(variant).double(), tokens(2, LONG)
    truth = model(token_ids)
    cache = model.new_cache(2, LONG)
    pieces = [model(token_ids[:, :40], cache=cache)]
    pieces += [model(token[:, None], cache=cache) for token in token_ids[:, 40:].unbind(1)]
    assert_same(torch.cat(pieces, dim=1), truth, within=1e-12)
    assert cache.length == LONG
    assert [layer.start > 0 for layer in cache] == [layer.window is not None for layer in cache], "no buffer has moved"
    assert_differ(pieces[0], truth[:, 1:41], by=1e-3, what="one token late")


@each_variant
@settings(max_examples=6)
@given(
    first=st.integers(1, 150),
    steps=st.lists(
        st.tuples(st.sampled_from(["read", "draft", "forget"]), st.integers(1, ROLLBACK)), min_size=6, max_size=12
    ),
)
@torch.no_grad()
def test_however_a_text_is_read_it_is_one_forward_pass(
    variant: dict[str, Any], first: int, steps: list[tuple[str, int]]
) -> None:
    """Read in chunks; draft wrong tokens and take them back; forget right ones and read them again."""
    model, token_ids = build(variant).double(), tokens(1, 250)
    truth = model(token_ids)
    cache = model.new_cache(1, 256)
    place = peak = 0
    for verb, count in [("read", first), *steps, ("read", 250)]:
        if verb == "read":
            chunk = token_ids[:, place : place + count]
            if chunk.shape[1]:
                logits = model(chunk, cache=cache)
                assert_same(logits, truth[:, place : place + count], within=1e-12, what=f"{verb} {count} at {place}")
            place += chunk.shape[1]
        elif verb == "draft":
            draft = tokens(1, min(count, 256 - place), seed=3)
            model(draft, cache=cache)
            peak = max(peak, cache.length)
        else:
            place = max(0, place - count, peak - ROLLBACK)
        peak = max(peak, place)
        cache.truncate(place)
        assert cache.length == place
    assert place == 250


@torch.no_grad()
def greedy(model: GPT2, prompts: Tensor, steps: int, cache: Cache | None = None) -> Tensor:
    """Token by token the likeliest; without a cache, by reading the whole text again for each."""
    text, unread = prompts, prompts
    for _ in range(steps):
        newest = model(text if cache is None else unread, cache=cache)[:, -1:].argmax(-1)
        text, unread = torch.cat([text, newest], dim=1), newest
    return text[:, prompts.shape[1] :]


@each_variant
def test_greedy_text_with_a_cache_is_greedy_text_without(variant: dict[str, Any]) -> None:
    model, prompts = build(variant), tokens(4, 50)
    slow, fast = greedy(model, prompts, 30), greedy(model, prompts, 30, model.new_cache(4, 80))
    assert torch.equal(fast, slow)
    other = GPT2(**variant | {"windows": [2]})
    other.load_state_dict(model.state_dict())
    assert other.config.windows != model.config.windows
    assert not torch.equal(greedy(other, prompts, 30, other.new_cache(4, 80)), slow)


@each_variant
@torch.no_grad()
def test_a_model_remembers_nothing_between_calls(variant: dict[str, Any]) -> None:
    """Two texts with a cache each, read in turn, and other calls between them."""
    model, token_ids = build(variant).double(), tokens(2, 40)
    before, caches = model(token_ids), [model.new_cache(1, 40), model.new_cache(1, 40)]
    for start in range(0, 40, 8):
        for row, cache in enumerate(caches):
            logits = model(token_ids[row : row + 1, start : start + 8], cache=cache)
            assert_same(logits[0], before[row, start : start + 8], within=1e-12)
        model(tokens(3, 30 + start, seed=start))
    assert torch.equal(model(token_ids), before)
    assert_differ(before[0], before[1], by=1e-3, what="another text")


# --- Weights: first ones, shapes, counts, storage ---------------------------------------------------------------------


@each_variant
@torch.no_grad()
def test_the_first_loss_is_the_log_of_the_vocabulary(variant: dict[str, Any]) -> None:
    """A model that knows nothing spreads its guess over all GPT-2 tokens: ln 50257 = 10.82 nats."""
    token_ids, targets = (tokens(2, SHORT, vocab_size=GPT2_VOCAB_SIZE, seed=seed) for seed in (1, 2))
    model = GPT2(**variant | {"vocab_size": GPT2_VOCAB_SIZE}, generator=torch.Generator().manual_seed(0))
    assert abs(model(token_ids, targets).mean().item() - math.log(GPT2_VOCAB_SIZE)) < 0.1
    for parameter in model.parameters():
        parameter.mul_(20)
    assert abs(model(token_ids, targets).mean().item() - math.log(GPT2_VOCAB_SIZE)) > 0.5


@each_variant
def test_the_rows_that_pad_the_vocabulary_are_no_tokens(variant: dict[str, Any]) -> None:
    model, token_ids, targets = build(variant), tokens(2, SHORT), tokens(2, SHORT, seed=2)
    rows = model.head_weight
    assert len(rows) == 64 and model.vocab_size == 61
    logits, losses = model(token_ids), model(token_ids, targets)
    assert logits.shape == (2, SHORT, 61)
    losses.sum().backward()
    assert not rows.grad[61:].any() and rows.grad[:61].any(dim=1).all()
    with torch.no_grad():
        rows[61:] = 1e4
        assert torch.equal(model(token_ids), logits) and torch.equal(model(token_ids, targets), losses)
        rows[60:] = 1e4
        assert_differ(model(token_ids), logits, by=1.0, what="the last row that is a token")


WRITERS = ("output_proj.weight", "down_proj.weight")
"""What writes to the residual stream."""


@each_variant
def test_the_first_weights_are_gpt2_s(variant: dict[str, Any]) -> None:
    """N(0, 0.02); on the two paths into the residual stream 0.02 / sqrt(2 * layers); biases 0; norms 1."""
    variant = variant | {"embed_dim": 64, "ff_hidden_dim": 256, "num_layers": 3}
    model = GPT2(**variant, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones(64)), name
        elif name.endswith("bias") or (variant.get("zero_init") and name.endswith(WRITERS)):
            assert not parameter.any(), name
        else:
            scaled = name.endswith(WRITERS)
            expected = 0.02 / math.sqrt(2 * 3) if scaled else 0.02
            error = 5 / math.sqrt(2 * parameter.numel())  # five standard errors of a standard deviation
            assert parameter.std().item() == pytest.approx(expected, rel=error), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name
    again, other = (GPT2(**variant, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(again.blocks[0].mlp.up_proj.weight, model.blocks[0].mlp.up_proj.weight)
    assert not torch.equal(other.blocks[0].mlp.up_proj.weight, model.blocks[0].mlp.up_proj.weight)


@each_variant
def test_num_parameters_is_the_sum_of_the_parts(variant: dict[str, Any]) -> None:
    model = GPT2(**variant)
    config, embed, hidden = model.config, 32, variant["ff_hidden_dim"]
    bias, up, experts = config.bias, 2 if config.activation == "swiglu" else 1, config.num_experts
    qkv = (4 + 2 * (config.num_kv_heads or 4)) * 8
    norm = embed * (2 if bias and config.norm == "layernorm" else 1)
    mlp = (embed + bias) * up * hidden + (hidden + bias) * embed
    router = embed * experts if experts > 1 else 0
    block = (embed + bias) * qkv + (embed + bias) * embed + experts * mlp + router + 2 * norm
    positions, heads = 256 if config.position == "learned" else 0, 1 if config.tie_head else 2
    assert model.num_parameters() == (heads * 61 + positions) * embed + 2 * block + norm


@pytest.mark.parametrize(
    ("size", "count"), {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}.items()
)
def test_the_published_sizes_have_the_published_counts(size: str, count: int) -> None:
    with torch.device("meta"):
        model = GPT2.from_config(GPT2Config.from_preset(size))
        rope = GPT2.from_config(GPT2Config.from_preset(size, position="rope"))
    assert model.num_parameters() == count
    assert rope.num_parameters() == count - 1024 * PRESETS[size]["embed_dim"]


def test_the_default_config_is_gpt2_124m() -> None:
    with torch.device("meta"):
        assert GPT2.from_config(GPT2Config()).num_parameters() == 124_439_808


@each_variant
@torch.no_grad()
def test_weights_survive_a_file(variant: dict[str, Any]) -> None:
    """safetensors refuses tensors that share memory, so the tied head must be one tensor."""
    model, other, token_ids = build(variant, seed=0), build(variant, seed=1), tokens(2, SHORT)
    assert_differ(model(token_ids), other(token_ids), by=1e-3, what="other weights")
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    assert torch.equal(model(token_ids), other(token_ids))
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@each_variant
def test_both_doors_build_the_same_model(variant: dict[str, Any]) -> None:
    model = GPT2(**variant)
    twin = GPT2.from_config(model.config)
    assert twin.config == model.config and str(twin) == str(model)
    assert [block.attn.window for block in twin.blocks] == [block.attn.window for block in model.blocks]
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(tokens(1, SHORT)), model(tokens(1, SHORT)))


@each_variant
@torch.no_grad()
def test_dropout_is_for_training_only(variant: dict[str, Any]) -> None:
    plain, dropping, token_ids = build(variant), build(variant | {"dropout": 0.5}), tokens(1, LONG)
    assert dropping.config.dropout != plain.config.dropout
    assert torch.equal(plain.train()(token_ids), plain.eval()(token_ids))
    assert torch.equal(dropping.eval()(token_ids), plain(token_ids))
    dropping.train()
    torch.manual_seed(0)
    once = dropping(token_ids)
    assert_differ(dropping(token_ids), once, by=1e-3, what="dropped again")
    torch.manual_seed(0)
    assert torch.equal(dropping(token_ids), once)


@pytest.mark.parametrize("name", ["learned-mha-full", "rope-gqa-windows-3-7"])
@pytest.mark.usefixtures("unchecked_shapes")
@torch.no_grad()
def test_the_model_compiles_as_one_graph(name: str) -> None:
    """Without a C++ compiler; what the graph becomes is a test for a GPU."""
    model, token_ids = build(VARIANTS[name]), tokens(1, LONG)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(compiled(token_ids), model(token_ids), within=1e-6)
    torch._dynamo.reset()


# --- The calls as they are written elsewhere --------------------------------------------------------------------------


def test_the_arguments_of_constructors_are_in_the_promised_order() -> None:
    model = GPT2(61, 16, 32, 4, 48, 2)
    config = model.config
    assert (config.vocab_size, config.max_seq_len, config.embed_dim) == (61, 16, 32)
    assert (config.num_heads, config.ff_hidden_dim, config.num_layers) == (4, 48, 2)
    assert model(tokens(1, 16)).shape == (1, 16, 61)
    with pytest.raises(TypeError, match="positional"):
        GPT2(61, 16, 32, 4, 48, 2, 1)
    attn = GroupQueryAttention(32, 4, 2)
    assert (attn.num_heads, attn.num_kv_heads, attn.head_dim) == (4, 2, 8)
    assert attn(torch.randn(2, 5, 32), torch.arange(5)).shape == (2, 5, 32)
    assert (RotaryEmbedding(8).dim, RotaryEmbedding(8).max_seq_len, RotaryEmbedding(8, 99).max_seq_len) == (8, 2048, 99)


def test_windows_are_tiled_over_the_layers() -> None:
    model = GPT2(**SHAPE | {"num_layers": 5, "windows": [3, 4, None]})
    assert [block.attn.window for block in model.blocks] == [3, 4, None, 3, 4]
    assert [layer.window for layer in model.new_cache(1, 8)] == [3, 4, None, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn", "rope_factor": 2}, "rope_scaling yarn needs position rope, not learned"),
        ({"position": "rope", "rope_scaling": "ntk"}, "rope_scaling ntk and rope_factor 1 go together"),
        ({"position": "rope", "rope_factor": 2}, "rope_scaling None and rope_factor 2 go together"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token 3 is more than num_experts 2"),
        ({"logit_softcap": 0}, "greater than 0"),
        ({"activation": "silu"}, "activation"),
        ({"experts": 2}, "experts"),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 32"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"num_heads": 32, "position": "rope"}, "odd"),
        ({"position": "alibi"}, "alibi"),
        ({"windows": [1, 2, 3]}, "windows has 3 entries for num_layers 2"),
        ({"windows": [0]}, "greater than or equal to 1"),
        ({"vocab_size": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    GPT2(**SHAPE)
    with pytest.raises(ValueError, match=message):
        GPT2(**SHAPE | changes)


def test_learned_positions_end_and_rotated_ones_do_not() -> None:
    learned, rope = GPT2(**VARIANTS["learned-mha-full"]), GPT2(**VARIANTS["rope-mha-full"])
    too_long = tokens(1, 257)
    assert rope(too_long).shape == (1, 257, 61)
    assert learned(too_long[:, :256]).shape == (1, 256, 61)
    with pytest.raises(ValueError, match=r"257 .*max_seq_len 256"):
        learned(too_long)
    cache = learned.new_cache(1, 300)
    learned(too_long[:, :256], cache=cache)
    with pytest.raises(ValueError, match=r"257 .*max_seq_len 256"):
        learned(too_long[:, 256:], cache=cache)
    assert cache.length == 256


def test_signatures_are_checked_here() -> None:
    """If the hook of conftest.py did not work, every other test would pass all the same."""
    with pytest.raises(TypeError, match="k"):
        attention.attend(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4))
