"""The same weights in another house's model: transformers' GPT-2, and for its variants the stock models that have them.

Starcoder2 for rope, grouped heads and a window; Llama for scaled rope, RMSNorm, SwiGLU and a head of its own; Mixtral for
experts; nanochat for normalised queries and keys, squared ReLU and bent logits.

Weights are copied by hand here, tensor by tensor, so this does not depend on what `gpt2lab.weights` believes of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config as HFConfig
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import Routing
from gpt2lab.model.rope import RotaryEmbedding
from tests.reference import assert_differ, assert_same

VOCAB, TIME = 61, 24


def loud(model: nn.Module) -> Any:
    """Weights so large that every part of the model shows in its logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def padded(embedding: Tensor) -> Tensor:
    """Rows for the tokens that are none: our models have a multiple of 64."""
    return torch.cat([embedding, torch.randn(-len(embedding) % 64, embedding.shape[1])])


def token_ids() -> Tensor:
    return torch.randint(VOCAB, (2, TIME))


def from_hf_gpt2(theirs: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Their Conv1D holds its weight as (in, out)."""
    ours = {
        "token_embedding.weight": padded(theirs["transformer.wte.weight"]),
        "position_embedding.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
    }
    for layer in range(num_layers):
        for our, their in {"attn_norm": "ln_1", "mlp_norm": "ln_2"}.items():
            for kind in ("weight", "bias"):
                ours[f"blocks.{layer}.{our}.{kind}"] = theirs[f"transformer.h.{layer}.{their}.{kind}"]
        for our, their in {
            "attn.qkv_proj": "attn.c_attn",
            "attn.output_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        }.items():
            ours[f"blocks.{layer}.{our}.weight"] = theirs[f"transformer.h.{layer}.{their}.weight"].T
            ours[f"blocks.{layer}.{our}.bias"] = theirs[f"transformer.h.{layer}.{their}.bias"]
    return ours


def make_hf_gpt2(**changes: Any) -> GPT2LMHeadModel:
    config = HFConfig(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=48, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    return loud(GPT2LMHeadModel(config))


@pytest.fixture
def hf_gpt2() -> GPT2LMHeadModel:
    return make_hf_gpt2()


def test_gpt2_is_transformers_gpt2(hf_gpt2: GPT2LMHeadModel) -> None:
    """Logits, loss, and the gradient of the embedding, in which the tied head and the input meet."""
    ours = GPT2(VOCAB, 32, 32, 4, 48, 2)
    ours.load_state_dict(from_hf_gpt2(hf_gpt2.state_dict(), 2))
    ids = token_ids()
    theirs = hf_gpt2(ids, labels=ids)
    assert_same(ours(ids), theirs.logits, within=1e-5, what="logits")

    loss = ours(ids[:, :-1], ids[:, 1:]).mean()
    assert_same(loss, theirs.loss, within=1e-5, what="loss")

    loss.backward()
    theirs.loss.backward()
    rows, their_rows = ours.token_embedding.weight.grad, hf_gpt2.transformer.wte.weight.grad
    assert_same(rows[:VOCAB], their_rows, within=1e-4 * their_rows.abs().max().item(), what="gradient of the embedding")
    assert not rows[VOCAB:].any()

    assert_differ(loss, ours(ids, ids).mean(), by=1e-2, what="targets that are not shifted")
    right = from_hf_gpt2(hf_gpt2.state_dict(), 2)
    for fault, (name, wrong) in {
        "Conv1D not transposed": ("blocks.1.attn.output_proj.weight", lambda weight: weight.T),
        "values before queries": ("blocks.0.attn.qkv_proj.weight", lambda weight: weight.roll(32, 0)),
        "norms exchanged": ("blocks.0.mlp_norm.bias", lambda bias: right["blocks.0.attn_norm.bias"]),
    }.items():
        ours.load_state_dict(right | {name: wrong(right[name])})
        assert_differ(ours(ids), theirs.logits, by=1e-2, what=fault)


@torch.no_grad()
def test_each_activation_is_transformers_in_gpt2() -> None:
    stock, ids, shape = (
        {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"},
        token_ids(),
        (VOCAB, 32, 32, 4, 48, 2),
    )
    for name, theirs in stock.items():
        hf_gpt2 = make_hf_gpt2(activation_function=theirs)
        logits = {}
        for activation in stock:
            ours = GPT2(*shape, activation=activation)
            ours.load_state_dict(from_hf_gpt2(hf_gpt2.state_dict(), 2))
            logits[activation] = ours(ids)
        assert_same(logits.pop(name), hf_gpt2(ids).logits, within=2e-5, what=name)
        for other, wrong in logits.items():
            assert_differ(wrong, hf_gpt2(ids).logits, by=2e-4, what=f"{other} in place of {name}")


def from_starcoder2(theirs: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    ours = {
        "token_embedding.weight": padded(theirs["model.embed_tokens.weight"]),
        "final_norm.weight": theirs["model.norm.weight"],
        "final_norm.bias": theirs["model.norm.bias"],
    }
    for layer in range(num_layers):
        for kind in ("weight", "bias"):
            for our, their in {
                "attn_norm": "input_layernorm",
                "mlp_norm": "post_attention_layernorm",
                "attn.output_proj": "self_attn.o_proj",
                "mlp.up_proj": "mlp.c_fc",
                "mlp.down_proj": "mlp.c_proj",
            }.items():
                ours[f"blocks.{layer}.{our}.{kind}"] = theirs[f"model.layers.{layer}.{their}.{kind}"]
            qkv = [theirs[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"blocks.{layer}.attn.qkv_proj.{kind}"] = torch.cat(qkv)
    return ours


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_rope_grouped_heads_and_a_window_are_starcoder2(kv_heads: int, window: int | None) -> None:
    config = Starcoder2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=32, sliding_window=window, norm_epsilon=1e-5, use_bias=True,
        tie_word_embeddings=True, rope_theta=5000.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    starcoder2, ids = loud(Starcoder2ForCausalLM(config)), token_ids()
    theirs = starcoder2(ids).logits

    def our_logits(**changes: Any) -> Tensor:
        variant = {"rope_base": 5000.0, "windows": window and [window]} | changes
        ours = GPT2(VOCAB, 32, 32, 4, 48, 2, num_kv_heads=kv_heads, position="rope", **variant)
        ours.load_state_dict(from_starcoder2(starcoder2.state_dict(), 2))
        return ours(ids)

    assert_same(our_logits(), theirs, within=1e-5)
    assert_differ(our_logits(windows=[(window or TIME - 2) + 1]), theirs, by=1e-3, what="another window")
    if window != 1:  # a token that meets only itself does not know where it stands
        assert_differ(our_logits(rope_base=10000.0), theirs, by=1e-3, what="another base")


# --- Llama, Mixtral, nanochat: the model's newer parts ----------------------------------------------------------------


def from_llama(theirs: Mapping[str, Tensor], *, bias: bool = False, tied: bool = False) -> dict[str, Tensor]:
    """Two layers. Without an MLP: that of Mixtral has another shape."""
    ours = {
        "token_embedding.weight": padded(theirs["model.embed_tokens.weight"]),
        "final_norm.weight": theirs["model.norm.weight"],
    }
    if not tied:
        ours["head.weight"] = padded(theirs["lm_head.weight"])
    for layer in range(2):
        our, their = f"blocks.{layer}", f"model.layers.{layer}"
        ours[f"{our}.attn_norm.weight"] = theirs[f"{their}.input_layernorm.weight"]
        ours[f"{our}.mlp_norm.weight"] = theirs[f"{their}.post_attention_layernorm.weight"]
        for kind in ("weight", "bias") if bias else ("weight",):
            qkv = [theirs[f"{their}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{our}.attn.qkv_proj.{kind}"] = torch.cat(qkv)
            ours[f"{our}.attn.output_proj.{kind}"] = theirs[f"{their}.self_attn.o_proj.{kind}"]
            if f"{their}.mlp.gate_proj.{kind}" in theirs:
                gate_and_up = [theirs[f"{their}.mlp.{part}_proj.{kind}"] for part in ("gate", "up")]
                ours[f"{our}.mlp.up_proj.{kind}"] = torch.cat(gate_and_up)
                ours[f"{our}.mlp.down_proj.{kind}"] = theirs[f"{their}.mlp.down_proj.{kind}"]
    return ours


LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
"""Of our size; Mixtral and nanochat take the same names."""

OURS: dict[str, Any] = {"position": "rope", "rope_base": 100.0, "norm": "rmsnorm", "activation": "swiglu"}


def assert_faults_show(
    logits: Callable[..., Tensor], right: Mapping[str, Tensor], theirs: Tensor, faults: Mapping[str, dict[str, Tensor]]
) -> None:
    """Every wrong copy of the weights gives other logits."""
    for fault, wrong in faults.items():
        assert_differ(logits(weights={**right, **wrong}), theirs, by=1e-2, what=fault)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rmsnorm_swiglu_and_a_head_of_its_own_are_llama(kv_heads: int, tied: bool, bias: bool) -> None:
    config = LlamaConfig(
        **LLAMA, num_key_value_heads=kv_heads, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    llama, ids = loud(LlamaForCausalLM(config)), token_ids()
    right = from_llama(llama.state_dict(), bias=bias, tied=tied)

    def model(weights: Mapping[str, Tensor] = right, **changes: Any) -> GPT2:
        variant = OURS | {"num_kv_heads": kv_heads, "bias": bias, "tie_head": tied} | changes
        ours = GPT2(VOCAB, 32, 32, 4, 48, 2, **variant)
        ours.load_state_dict(weights)
        return ours

    theirs, ours = llama(ids, labels=ids), model()
    assert_same(ours(ids), theirs.logits, within=2e-5)
    theirs.loss.backward()
    ours(ids[:, :-1], ids[:, 1:]).mean().backward()
    gradient = llama.model.layers[0].mlp.gate_proj.weight.grad
    assert_same(
        ours.blocks[0].mlp.up_proj.weight.grad[:48],
        gradient,
        within=1e-4 * gradient.abs().max().item(),
        what="gradient",
    )

    def logits(**how: Any) -> Tensor:
        return model(**how)(ids)

    up = right["blocks.1.mlp.up_proj.weight"]
    faults = {
        "gate and gated exchanged": {"blocks.1.mlp.up_proj.weight": up.roll(48, 0)},
        "gate and gated in turn": {"blocks.1.mlp.up_proj.weight": up.view(2, 48, 32).transpose(0, 1).reshape(96, 32)},
        "norms exchanged": {"blocks.0.mlp_norm.weight": right["blocks.0.attn_norm.weight"]},
    }
    if not tied:
        faults["the embedding for a head"] = {"head.weight": right["token_embedding.weight"]}
    assert_faults_show(logits, right, theirs.logits, faults)
    assert_differ(logits(rope_base=200.0), theirs.logits, by=1e-2, what="another base")
    if not bias:
        assert_differ(logits(norm="layernorm"), theirs.logits, by=1e-2, what="LayerNorm in place of RMSNorm")


@torch.no_grad()
def test_scaled_rope_is_llama() -> None:
    """In a whole model, where both sides learn of it from their configs. Dynamic NTK at twice a length is static NTK of 2."""
    stock = {
        None: {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 2.0},
        "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12},
        "ntk": {"rope_type": "dynamic", "factor": 1.0},
    }
    ids, logits, theirs = token_ids(), {}, {}
    for scaling, parameters in stock.items():
        config = LlamaConfig(**LLAMA, num_key_value_heads=2, rope_parameters={**parameters, "rope_theta": 100.0})
        config.max_position_embeddings = 12 if scaling == "ntk" else 24
        torch.manual_seed(0)
        llama = loud(LlamaForCausalLM(config))
        theirs[scaling] = llama(ids).logits
        changes = {"rope_scaling": scaling, "rope_factor": 2.0} if scaling else {}
        ours = GPT2(VOCAB, TIME, 32, 4, 48, 2, num_kv_heads=2, bias=False, tie_head=False, **OURS, **changes)
        ours.load_state_dict(from_llama(llama.state_dict()))
        logits[scaling] = ours(ids)
    for scaling in stock:
        assert_same(logits[scaling], theirs[scaling], within=2e-5, what=str(scaling))
        for other in stock.keys() - {scaling}:
            assert_differ(logits[scaling], theirs[other], by=1e-2, what=f"{scaling}, not {other}")


def mixtral_and_weights(chosen: int, window: int | None = None) -> tuple[MixtralForCausalLM, dict[str, Tensor]]:
    config = MixtralConfig(
        **LLAMA, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=chosen, sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    mixtral = loud(MixtralForCausalLM(config))
    theirs = mixtral.state_dict()
    ours = from_llama(theirs)
    for layer in range(2):
        our, their = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        ours[f"{our}.router.weight"] = theirs[f"{their}.gate.weight"]
        ours[f"{our}.up_proj.weight"] = theirs[f"{their}.experts.gate_up_proj"]
        ours[f"{our}.down_proj.weight"] = theirs[f"{their}.experts.down_proj"]
    return mixtral, ours


MIXTRAL: dict[str, Any] = OURS | {"num_kv_heads": 2, "bias": False, "tie_head": False, "num_experts": 4}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_experts_are_mixtral(chosen: int, window: int | None) -> None:
    """Logits, and gradients of a router and of the experts."""
    (mixtral, right), ids = mixtral_and_weights(chosen, window), token_ids()

    def model(weights: Mapping[str, Tensor] = right, **changes: Any) -> GPT2:
        variant = {"experts_per_token": chosen, "windows": window and [window]} | changes
        ours = GPT2(VOCAB, 32, 32, 4, 48, 2, **MIXTRAL | variant)
        ours.load_state_dict(weights)
        return ours

    theirs, ours = mixtral(ids, labels=ids), model()
    assert_same(ours(ids), theirs.logits, within=2e-5)
    theirs.loss.backward()
    ours(ids[:, :-1], ids[:, 1:]).mean().backward()
    for layer in range(2):
        our, their = ours.blocks[layer].mlp, mixtral.model.layers[layer].mlp
        pairs = {"up": (our.up_proj, their.experts.gate_up_proj), "down": (our.down_proj, their.experts.down_proj)}
        if chosen > 1:  # one expert weighs 1 whatever its router says; what is left of its gradient there is rounding
            pairs["router"] = (our.router, their.gate.weight)
        for name, (part, parameter) in pairs.items():
            within = 1e-4 * parameter.grad.abs().max().item()
            assert within > 0
            assert_same(part.weight.grad, parameter.grad, within=within, what=f"gradient of {name} {layer}")

    def logits(**how: Any) -> Tensor:
        return model(**how)(ids)

    with torch.no_grad():
        up, router = right["blocks.1.mlp.up_proj.weight"], right["blocks.0.mlp.router.weight"]
        faults = {
            "experts in another order": {"blocks.1.mlp.up_proj.weight": up.roll(1, 0)},
            "gate and gated exchanged": {"blocks.1.mlp.up_proj.weight": up.roll(48, 1)},
            "the router of another layer": {"blocks.0.mlp.router.weight": right["blocks.1.mlp.router.weight"]},
            "a router half as sure": {"blocks.0.mlp.router.weight": router / 2},
        }
        if chosen == 1:
            del faults["a router half as sure"]  # it chooses the same, and one expert weighs 1
        assert_faults_show(logits, right, theirs.logits, faults)
        other = logits(experts_per_token=chosen % 4 + 1)
        assert_differ(other, theirs.logits, by=1e-2, what="another number of experts a token")


@pytest.mark.parametrize("chosen", [1, 2, 4])
@torch.no_grad()
def test_the_losses_of_routers_are_mixtral_s_and_the_switch_transformer_s(chosen: int) -> None:
    """Their shares of tokens add up to the experts per token; ours to 1, so that even is 1 whatever that number."""
    (mixtral, weights), ids, routing = mixtral_and_weights(chosen), token_ids(), Routing()
    ours = GPT2(VOCAB, 32, 32, 4, 48, 2, **MIXTRAL, experts_per_token=chosen)
    ours.load_state_dict(weights)
    ours(ids, routing=routing)
    layers = mixtral(ids, output_router_logits=True).router_logits
    assert len(layers) == len(routing.counts) == 2
    for layer, logits in enumerate(layers):
        theirs = load_balancing_loss_func((logits,), 4, chosen)
        assert_same(chosen * routing.balance_losses[layer], theirs, within=1e-5, what="balance")
        assert_same(routing.z_losses[layer], router_z_loss_func(logits[None]), within=1e-4, what="z")
        assert_differ(
            routing.z_losses[layer], router_z_loss_func(layers[1 - layer][None]), by=1e-3, what="another layer"
        )
        votes = logits.topk(chosen).indices.flatten().bincount(minlength=4)
        assert torch.equal(routing.counts[layer], votes)
    if chosen < 4:
        assert_differ(routing.balance_loss, torch.ones(()), by=1e-2, what="as if it were even")
    assert_same(routing.z_loss, router_z_loss_func(torch.stack(layers)), within=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_normalised_queries_and_keys_squared_relu_and_bent_logits_are_nanochat(kv_heads: int) -> None:
    """Its norms have no weights: ours are 1. It normalises embeddings once more, which can be done to the table.

    It turns by the same angles the other way round, and normalises after that, which is the same for a norm without weights.
    Reading each query and key from its second half turns what it does into what we do.
    """
    rope = {"rope_type": "default", "rope_theta": 100.0}
    settings = LLAMA | {"pad_token_id": None, "num_key_value_heads": kv_heads, "rope_parameters": rope}
    config = NanoChatConfig(**settings, final_logit_softcapping=2.0)
    nanochat, ids = loud(NanoChatForCausalLM(config)), token_ids()
    theirs, logits_there = nanochat.state_dict(), nanochat(ids).logits
    assert config.hidden_act == "relu2" and not config.tie_word_embeddings

    rows = theirs["model.embed_tokens.weight"]
    right = {
        "token_embedding.weight": padded(rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()),
        "head.weight": padded(theirs["lm_head.weight"]),
        "final_norm.weight": torch.ones(32),
    }
    for layer in range(2):
        our, their = f"blocks.{layer}", f"model.layers.{layer}"
        q, k, v = (theirs[f"{their}.self_attn.{part}_proj.weight"] for part in "qkv")
        q, k = (x.view(-1, 2, 4, 32).flip(1).reshape(x.shape) for x in (q, k))
        right[f"{our}.attn.qkv_proj.weight"] = torch.cat([q, k, v])
        right[f"{our}.attn.output_proj.weight"] = theirs[f"{their}.self_attn.o_proj.weight"]
        right[f"{our}.mlp.up_proj.weight"] = theirs[f"{their}.mlp.fc1.weight"]
        right[f"{our}.mlp.down_proj.weight"] = theirs[f"{their}.mlp.fc2.weight"]
        right[f"{our}.attn_norm.weight"] = right[f"{our}.mlp_norm.weight"] = torch.ones(32)

    def our_logits(weights: Mapping[str, Tensor] = right, **changes: Any) -> Tensor:
        variant = OURS | {"num_kv_heads": kv_heads, "bias": False, "tie_head": False, "activation": "relu2"}
        ours = GPT2(VOCAB, 32, 32, 4, 48, 2, **variant | {"qk_norm": True, "logit_softcap": 2.0} | changes)
        ours.load_state_dict(weights)
        return ours(ids)

    assert_same(our_logits(), logits_there, within=2e-5)
    for what, changes in {
        "queries and keys as they are": {"qk_norm": False},
        "logits as they are": {"logit_softcap": None},
        "another cap": {"logit_softcap": 3.0},
        "another activation": {"activation": "gelu"},
    }.items():
        assert_differ(our_logits(**changes), logits_there, by=1e-2, what=what)
    qkv = "blocks.0.attn.qkv_proj.weight"
    q_and_k = right[qkv].clone()
    q_and_k[: -8 * kv_heads] = q_and_k[: -8 * kv_heads].view(-1, 2, 4, 32).flip(1).reshape(-1, 32)
    faults = {
        "turned the other way": {qkv: q_and_k},
        "embeddings not normalised": {"token_embedding.weight": padded(rows)},
    }
    assert_faults_show(our_logits, right, logits_there, faults)


# --- RoPE by itself ---------------------------------------------------------------------------------------------------


def test_rope_is_transformers_rope() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_theta=10000.0)
    q, k, positions = torch.randn(2, 4, TIME, 8), torch.randn(2, 2, TIME, 8), torch.arange(100, 100 + TIME)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    their_q, their_k = apply_rotary_pos_emb(q, k, cos, sin)
    rope = RotaryEmbedding(8)
    assert_same(rope(q, positions), their_q, within=1e-4)
    assert_same(rope(k, positions), their_k, within=1e-4)
    assert_differ(rope(q, positions + 1), their_q, by=0.1, what="one position late")
    assert_differ(RotaryEmbedding(8, base=5000.0)(q, positions), their_q, by=0.1, what="another base")
    neighbours = q.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    assert_differ(rope(neighbours, positions), their_q, by=0.1, what="pairs of neighbours")


def stock_rope(scaling: str | None, dim: int, base: float, trained: int, factor: float) -> LlamaRotaryEmbedding:
    """Theirs, for a text of `factor` times the trained length. Their dynamic NTK has grown to it, by its own rule."""
    name = {"ntk": "dynamic", None: "default"}.get(scaling, scaling)
    parameters: dict[str, Any] = {"rope_type": name, "rope_theta": base, "factor": 1.0 if scaling == "ntk" else factor}
    if scaling == "yarn":
        parameters["original_max_position_embeddings"] = trained
    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, rope_parameters=parameters)
    config.max_position_embeddings = trained if scaling == "ntk" else round(trained * factor)
    rope = LlamaRotaryEmbedding(config)
    rope(torch.zeros(1, 1, 1, dim), torch.tensor([[round(trained * factor) - 1]]))
    return rope


def our_rope(scaling: str | None, dim: int, base: float, trained: int, factor: float) -> RotaryEmbedding:
    longer = factor if scaling else 1.0
    return RotaryEmbedding(dim, round(trained * longer), base=base, scaling=scaling, factor=longer)


@pytest.mark.parametrize("scaling", [None, "linear", "ntk", "yarn"])
@example(half=4, base=100.0, quarter=1024, factor=16)  # all pairs turn often in training, so yarn's ramp is cut off
@given(
    half=st.integers(2, 64), base=st.floats(100, 1e6), quarter=st.integers(2, 1024), factor=st.integers(5, 128)
)  # fmt: skip
def test_frequencies_are_transformers(scaling: str | None, half: int, base: float, quarter: int, factor: int) -> None:
    """A factor in quarters, and a trained length that it multiplies to a whole number."""
    dim, trained, times = 2 * half, 4 * quarter, factor / 4
    ours, theirs = our_rope(scaling, dim, base, trained, times), stock_rope(scaling, dim, base, trained, times)

    def beside_theirs(rope: RotaryEmbedding) -> Tensor:
        return torch.cat([rope.frequencies() / theirs.inv_freq, torch.tensor([rope.amplitude])])

    right = torch.tensor([1.0] * half + [theirs.attention_scaling])
    assert_same(beside_theirs(ours), right, within=1e-5)
    if scaling:
        other = our_rope(scaling, dim, base, trained, 2 * times)
        assert_differ(beside_theirs(other), right, by=0.05, what="another factor")
    other = our_rope(scaling, dim, 1.5 * base, trained, times)
    assert_differ(beside_theirs(other), right, by=0.05, what="another base")


@pytest.mark.parametrize("scaling", [None, "linear", "ntk", "yarn"])
def test_scaled_rotation_is_transformers(scaling: str | None) -> None:
    """And that of no other scaling: 64 tokens trained, 256 read."""
    q, positions = torch.randn(2, 4, 256, 16), torch.arange(256)

    def rotated(scaling: str | None, **changes: Any) -> Tensor:
        settings = {"dim": 16, "base": 500.0, "trained": 64, "factor": 4.0} | changes
        return our_rope(scaling, **settings)(q, positions)

    cos, sin = stock_rope(scaling, 16, 500.0, 64, 4.0)(q, positions[None])
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin)
    assert_same(rotated(scaling), theirs, within=5e-4)
    for other in {None, "linear", "ntk", "yarn"} - {scaling}:
        assert_differ(rotated(other), theirs, by=0.1, what=f"{other} in place of {scaling}")
    if scaling:
        assert_differ(rotated(scaling, factor=8.0), theirs, by=0.1, what="another factor")
    if scaling == "yarn":
        assert_differ(rotated(scaling, trained=128), theirs, by=0.1, what="another trained length")
