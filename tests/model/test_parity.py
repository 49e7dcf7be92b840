"""The same weights in another house's model: transformers' GPT-2, and Starcoder2 for rope, grouped heads and a window.

Weights are copied by hand here, tensor by tensor, so this does not depend on what `gpt2lab.weights` believes of them.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel, LlamaConfig, Starcoder2Config, Starcoder2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from gpt2lab.model.gpt2 import GPT2
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


@pytest.fixture
def hf_gpt2() -> GPT2LMHeadModel:
    config = HFConfig(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=48, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return loud(GPT2LMHeadModel(config))


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
