"""The slow definition of the model: loops over b, h, i and j, in float64. Every fast path is compared with it.

Written to be read beside the papers and to share no code with the package. It is differentiable, since all it does is
indexing and arithmetic. The conventions that are easiest to get wrong are `Rules`; a planted fault is one rule replaced.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpt2lab.config import GPT2Config


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return (a.detach().double() - b.detach().double()).abs().max().item()


def assert_same(ours: Tensor, theirs: Tensor, within: float, what: str = "ours and theirs") -> None:
    """Two tensors are the same up to rounding. NaN is never the same."""
    found = difference(ours, theirs)
    assert found <= within, f"{what} differ by {found:.3g}; {within:.3g} is allowed"


def assert_differ(ours: Tensor, theirs: Tensor, by: float, what: str) -> None:
    """The control: `theirs` is wrong on purpose, and the difference is far above what is forgiven; it is printed."""
    found = difference(ours, theirs)
    print(f"{what}: differs by {found:.3g}")
    assert found >= by, f"{what}: differs by {found:.3g} only, so the test could not have seen it"


@dataclass(frozen=True)
class Rules:
    """The conventions of attention, each a function of plain numbers."""

    sees: Callable[[int, int | None], bool]
    """(q_pos - k_pos, window): does this query see this key?"""
    kv_head: Callable[[int, int, int], int]
    """(query head, query heads, key heads): whose keys does it read?"""
    pair: Callable[[int, int], tuple[int, int]]
    """(i, dim): the two coordinates that rope's i-th angle turns, first towards second."""
    chosen: Callable[[list[float], int], list[int]]
    """(router logits, k): the experts that a token goes to."""
    share: Callable[[Tensor, list[int]], Tensor]
    """(router logits, chosen): what each chosen expert weighs."""
    gate: Callable[[int], tuple[slice, slice]]
    """(hidden): the part of swiglu's input that goes through SiLU, and the part that it gates."""


RULES = Rules(
    sees=lambda distance, window: distance >= 0 and (window is None or distance < window),
    kv_head=lambda head, heads, kv_heads: head // (heads // kv_heads),
    pair=lambda i, dim: (i, i + dim // 2),
    chosen=lambda logits, k: sorted(range(len(logits)), key=lambda e: -logits[e])[:k],
    share=lambda logits, chosen: logits.softmax(0)[chosen] / logits.softmax(0)[chosen].sum(),
    gate=lambda hidden: (slice(0, hidden), slice(hidden, 2 * hidden)),
)


def planted_faults(config: GPT2Config) -> dict[str, Rules]:
    """The rules of every bug that could show in a model of this config, by what is wrong."""
    heads, kv_heads, windows = config.num_heads, config.num_kv_heads or config.num_heads, config.windows or (None,)
    bounded = [window for window in windows if window is not None]
    looks_back = any(window != 1 for window in windows)  # with windows of 1, no token meets another
    faults = {}
    if looks_back:
        faults["mask on the wrong side"] = replace(RULES, sees=lambda d, w: RULES.sees(-d, w))
    if bounded:
        faults["window one too wide"] = replace(RULES, sees=lambda d, w: RULES.sees(d, w and w + 1))
    if any(window > 1 for window in bounded):
        faults["window one too narrow"] = replace(RULES, sees=lambda d, w: RULES.sees(d, w and max(1, w - 1)))
    if kv_heads > 1:
        faults["heads shuffled"] = replace(RULES, kv_head=lambda h, n, m: (RULES.kv_head(h, n, m) + 1) % m)
    if 1 < kv_heads < heads:
        faults["heads grouped in turn"] = replace(RULES, kv_head=lambda h, n, m: h % m)
    if config.activation == "swiglu":
        faults["gate and gated exchanged"] = replace(RULES, gate=lambda hidden: RULES.gate(hidden)[::-1])
    if config.num_experts > 1:
        faults["experts after the best"] = replace(RULES, chosen=lambda x, k: RULES.chosen(x, k + 1)[1:])
    if config.experts_per_token < config.num_experts:
        faults["experts' weights not normalised"] = replace(RULES, share=lambda x, chosen: x.softmax(0)[chosen])
    if config.experts_per_token > 1:
        faults["experts' weights exchanged"] = replace(RULES, share=lambda x, chosen: RULES.share(x, chosen[::-1]))
    if config.position == "rope" and looks_back:
        faults["rope turns neighbours"] = replace(RULES, pair=lambda i, dim: (2 * i, 2 * i + 1))
        faults["rope turns backwards"] = replace(RULES, pair=lambda i, dim: RULES.pair(i, dim)[::-1])
    return faults


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_start: int = 0,
    k_start: int = 0,
    window: int | None = None,
    documents: list[list[int]] | None = None,
    rules: Rules = RULES,
) -> Tensor:
    """Queries (b, h, i, dim) at positions q_start... look at keys and values (b, kv_head, j, dim) at k_start...

    `documents`: which document each token of each row belongs to; nothing is seen of another one.
    """
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = rules.kv_head(h, q.shape[1], k.shape[1])
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if rules.sees(q_start + i - (k_start + j), window)]
                if documents is not None:
                    seen = [j for j in seen if documents[b][j] == documents[b][i]]
                scores = [q[b, h, i].dot(k[b, kv, j]) / math.sqrt(q.shape[3]) for j in seen]
                weights = torch.stack(scores).softmax(dim=0)
                out[b, h, i] = sum(weight * v[b, kv, j] for weight, j in zip(weights, seen, strict=True))
    return out


def turn(
    i: int, dim: int, *, base: float, scaling: str | None = None, factor: float = 1.0, trained: float = 1.0
) -> float:
    """Radians that rope's i-th pair turns from one position to the next. `trained`: tokens before any scaling."""
    if scaling == "ntk":
        base = base * factor ** (dim / (dim - 2))
    radians = base ** (-2 * i / dim)
    if scaling == "linear":
        return radians / factor
    if scaling == "yarn":

        def pair_that_turns(times: int) -> float:
            return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

        first, last = max(0, math.floor(pair_that_turns(32))), min(dim - 1, math.ceil(pair_that_turns(1)))
        squeezed = min(1.0, max(0.0, (i - first) / (last - first)))
        return radians * (1 - squeezed) + radians / factor * squeezed
    return radians


def rotate(x: Tensor, *, start: int = 0, base: float = 10000.0, rules: Rules = RULES, **scaled: Any) -> Tensor:
    """RoPE: at position t, the i-th pair of coordinates turns by t * base ** (-2i / dim) radians."""
    time, dim = x.shape[-2:]
    t = torch.arange(start, start + time, dtype=torch.float64)
    longer = 1 + 0.1 * math.log(scaled["factor"]) if scaled.get("scaling") == "yarn" else 1.0
    out = torch.zeros_like(x)
    for i in range(dim // 2):
        angle = t * turn(i, dim, base=base, **scaled)
        a, b = rules.pair(i, dim)
        out[..., a] = longer * (x[..., a] * angle.cos() - x[..., b] * angle.sin())
        out[..., b] = longer * (x[..., b] * angle.cos() + x[..., a] * angle.sin())
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def rms_norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def activate(x: Tensor, name: str, rules: Rules = RULES) -> Tensor:
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "relu2":
        return torch.where(x > 0, x**2, torch.zeros_like(x))
    gate, gated = (x[..., part] for part in rules.gate(x.shape[-1] // 2))
    return gate / (1 + torch.exp(-gate)) * gated


def documents_of(token_ids: list[int], end_of_text: int) -> list[int]:
    """The number of the document that each token belongs to; end-of-text is the last token of its own."""
    numbers, number = [], 0
    for token in token_ids:
        numbers.append(number)
        number += token == end_of_text
    return numbers


def gpt2_logits(
    weights: Mapping[str, Tensor],
    config: GPT2Config,
    token_ids: Tensor,
    rules: Rules = RULES,
    *,
    documents: list[list[int]] | None = None,
    restart: bool = False,
) -> Tensor:
    """The logits of a GPT-2 with these weights (a state_dict); `restart`: learned positions begin anew in each document."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    batch, time = token_ids.shape
    dim, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads or config.num_heads

    def linear(x: Tensor, name: str, expert: int | None = None) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias", torch.zeros(1))
        if expert is not None:
            weight, bias = weight[expert], bias[expert if len(bias) > 1 else 0]
        return x @ weight.T + bias

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "rmsnorm":
            return rms_norm(x, weights[f"{name}.weight"])
        return layer_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias", 0.0))

    def mlp(x: Tensor, name: str, expert: int | None = None) -> Tensor:
        hidden = activate(linear(x, f"{name}.up_proj", expert), config.activation, rules)
        return linear(hidden, f"{name}.down_proj", expert)

    def experts(x: Tensor, name: str) -> Tensor:
        logits = linear(x, f"{name}.router")
        out = torch.zeros_like(x)
        for b in range(batch):
            for t in range(time):
                chosen = rules.chosen(logits[b, t].tolist(), config.experts_per_token)
                shares = rules.share(logits[b, t], chosen)
                parts = [share * mlp(x[b, t], name, e) for share, e in zip(shares, chosen, strict=True)]
                out[b, t] = torch.stack(parts).sum(0)
        return out

    scaled = {"scaling": config.rope_scaling, "factor": config.rope_factor}
    scaled["trained"] = config.max_seq_len / config.rope_factor
    x = weights["token_embedding.weight"][token_ids]
    if config.position == "learned":
        places = [list(range(time)) for _ in range(batch)]
        if restart and documents is not None:
            places = [[t - row.index(number) for t, number in enumerate(row)] for row in documents]
        x = x + weights["position_embedding.weight"][torch.tensor(places)]
    for layer in range(config.num_layers):
        name = f"blocks.{layer}"
        window = config.windows[layer % len(config.windows)] if config.windows else None
        qkv = linear(norm(x, f"{name}.attn_norm"), f"{name}.attn.qkv_proj")
        qkv = qkv.view(batch, time, heads + 2 * kv_heads, dim).transpose(1, 2)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if config.position == "rope":
            q, k = (rotate(x, base=config.rope_base, rules=rules, **scaled) for x in (q, k))
        attended = attention(q, k, v, window=window, documents=documents, rules=rules)
        attended = attended.transpose(1, 2).reshape(batch, time, heads * dim)
        x = x + linear(attended, f"{name}.attn.output_proj")
        feed = experts if config.num_experts > 1 else mlp
        x = x + feed(norm(x, f"{name}.mlp_norm"), f"{name}.mlp")
    head = weights["token_embedding.weight" if config.tie_head else "head.weight"]
    logits = norm(x, "final_norm") @ head[: config.vocab_size].T
    return logits if config.logit_softcap is None else config.logit_softcap * torch.tanh(logits / config.logit_softcap)
