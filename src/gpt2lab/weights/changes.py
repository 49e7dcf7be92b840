"""What becomes of the weights at each change of a model's config, and why it is or is not the same function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt2lab.config import GPT2Config
from gpt2lab.errors import ConfigError
from gpt2lab.weights.layout import EMBEDDING, HEAD

POSITIONS = "position_embedding.weight"
ROUTER_STD = 0.02


@dataclass
class Work:
    """The weights on their way from one config to the other; each change takes what the one before it left."""

    before: GPT2Config
    after: GPT2Config
    weights: dict[str, Tensor]
    generator: torch.Generator
    cut: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)

    def named(self, *endings: str) -> dict[str, Tensor]:
        """The weights whose names end so."""
        return {name: tensor for name, tensor in self.weights.items() if name.endswith(endings)}

    def drop(self, names: Iterable[str], reason: str) -> None:
        """Leave weights behind."""
        for name in names:
            del self.weights[name]
            self.dropped[name] = reason

    def change(self, key: str) -> str:
        """What is changed, in one phrase: ``num_kv_heads 4 -> 2``."""
        return f"{key} {show(getattr(self.before, key))} -> {show(getattr(self.after, key))}"

    def same(self, key: str, why: str) -> None:
        """This change leaves the function as it was."""
        self.exact.append(f"{self.change(key)}: the same function: {why}.")

    def other(self, key: str, why: str) -> None:
        """This change does not."""
        self.approximate.append(f"{self.change(key)}: a start that has to be trained: {why}.")

    def refused(self, key: str, cause: str, fix: str) -> ConfigError:
        """This change cannot be made."""
        return ConfigError("cannot convert", where=self.change(key), cause=cause, fix=fix)

    @property
    def shorter(self) -> int:
        """Tokens of the longest text that both models are for."""
        return min(self.before.max_seq_len, self.after.max_seq_len)


def _position(work: Work, key: str) -> None:
    if work.after.position == "learned":
        cause, fix = "RoPE holds nothing that a table of positions could be made of", "keep position rope"
        raise work.refused(key, cause, fix)
    work.drop([POSITIONS], "RoPE needs no table")
    work.other(key, "the table of positions is dropped, and queries and keys are turned, which they never were")


def _norm(work: Work, key: str) -> None:
    if work.after.norm == "rmsnorm":
        work.drop(work.named("norm.bias"), "RMSNorm has no bias")
        work.other(key, "RMSNorm does not centre, and has no bias")
    else:
        work.other(key, "LayerNorm centres what RMSNorm did not")


def _bias(work: Work, key: str) -> None:
    if work.after.bias:  # they are filled in at the end, where their shapes are known
        work.same(key, "all biases are 0")
        return
    biases = work.named(".bias")
    if learned := [name for name, bias in biases.items() if bias.any()]:
        cause = f"{len(learned)} of {len(biases)} biases are not 0, the first of them {learned[0]}"
        raise work.refused(key, cause, "keep bias true")
    work.drop(biases, "all 0")
    work.same(key, "all biases were 0")


def _num_kv_heads(work: Work, key: str) -> None:
    """Fewer heads are the means of groups (Ainslie et al. 2023, arXiv:2305.13245); more are the same ones repeated."""
    old, new = work.before.num_kv_heads or work.before.num_heads, work.after.num_kv_heads or work.after.num_heads
    heads = work.before.num_heads
    if old % new and new % old:
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and n != old and (old % n == 0 or n % old == 0)]
        cause = f"{old} heads can be neither pooled nor repeated into {new}"
        raise work.refused(key, cause, f"one of {', '.join(map(str, fits))}")
    all_equal = True
    for name, tensor in work.named("attn.qkv_proj.weight", "attn.qkv_proj.bias").items():
        split = tensor.unflatten(0, (-1, work.before.head_dim))
        queries, *keys_and_values = split.split([heads, old, old])
        if new > old:
            parts = [part.repeat_interleave(new // old, dim=0) for part in keys_and_values]
            work.made[name] = f"each of {old} KV heads {new // old} times"
        else:
            pooled = [_pool(part, new) for part in keys_and_values]
            parts = [part for part, _ in pooled]
            all_equal = all_equal and all(equal for _, equal in pooled)
            work.cut[name] = f"{old} KV heads pooled into {new}, the mean of each {old // new}"
        work.weights[name] = torch.cat([queries, *parts]).flatten(0, 1)
    if new > old:
        work.same(key, f"each KV head stands there {new // old} times, and every query head reads what it read")
    elif all_equal:
        work.same(key, f"the {old // new} KV heads of each group were equal")
    else:
        work.other(key, f"each new KV head is the mean of {old // new}")


def _pool(heads: Tensor, groups: int) -> tuple[Tensor, bool]:
    """The mean of each group of consecutive heads, rounded once; and whether the heads of every group were equal."""
    heads = heads.unflatten(0, (groups, -1))
    equal = (heads == heads[:, :1]).all(dim=1)
    mean = heads.double().mean(dim=1).to(heads.dtype)
    return torch.where(equal, heads[:, 0], mean), bool(equal.all())  # equal numbers stay as they are, -0.0 too


def _num_experts(work: Work, key: str) -> None:
    """Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): each expert begins as a copy of the MLP."""
    new = work.after.num_experts
    if work.before.num_experts == 1:
        for name, tensor in work.named(*_MLP).items():
            work.weights[name] = tensor.expand(new, *tensor.shape)
            work.made[name] = f"{new} copies of the MLP's, one an expert"
        shape, like = (new, work.before.embed_dim), work.weights[EMBEDDING]
        for layer in range(work.before.num_layers):
            router = torch.empty(shape, device=work.generator.device).normal_(0, ROUTER_STD, generator=work.generator)
            name = f"blocks.{layer}.mlp.router.weight"
            work.weights[name] = router.to(like)
            work.made[name] = f"drawn from N(0, {ROUTER_STD})"
        work.same(key, "every expert is the MLP that was there, and the weights of a token's experts add up to 1")
    elif new == 1:
        if not _experts_are_equal(work):
            raise work.refused(key, "the experts differ, and no one MLP does what they do", "keep num_experts")
        for name, tensor in work.named(*_MLP).items():
            work.weights[name] = tensor[0]
            work.cut[name] = f"one of {len(tensor)} equal experts"
        work.drop(work.named("mlp.router.weight"), "nothing is left to choose from")
        work.same(key, "all experts were equal")
    else:
        cause = "copies of experts, under copies of the router's rows, would be trained alike and stay copies"
        fix = f"keep num_experts {work.before.num_experts}, or convert the dense model that the experts came from"
        raise work.refused(key, cause, fix)


_MLP = tuple(f"mlp.{projection}.{kind}" for projection in ("up_proj", "down_proj") for kind in ("weight", "bias"))


def _experts_are_equal(work: Work) -> bool:
    return all(bool((tensor == tensor[:1]).all()) for tensor in work.named(*_MLP).values())


def _experts_per_token(work: Work, key: str) -> None:
    if work.after.num_experts == 1:
        work.same(key, "one MLP is left")
    elif _experts_are_equal(work):
        work.same(key, "all experts are equal, and their weights add up to 1")
    else:
        work.other(key, "each token is given to another number of experts")


def _max_seq_len(work: Work, key: str) -> None:
    old, new, upto = work.before.max_seq_len, work.after.max_seq_len, f"for texts of up to {work.shorter} tokens"
    if work.after.position == "learned":
        table = work.weights[POSITIONS]
        work.weights[POSITIONS] = table[torch.arange(new, device=table.device) % old]
        if new < old:
            work.cut[POSITIONS] = f"the last {old - new} of {old} rows"
            work.same(key, f"{upto}; the rows after them are dropped")
        else:  # as Beltagy et al. 2020 (arXiv:2004.05150) began
            work.made[POSITIONS] = f"{old} rows, repeated from the first on"
            work.same(key, f"{upto}; the rows after them repeat the table from its start, and have to be trained")
    elif any(getattr(work.before, name) != getattr(work.after, name) for name in _ROPE):
        work.other(key, "positions are told in another way too")
    elif work.after.rope_scaling == "yarn":
        trained = " -> ".join(f"{config.max_seq_len / config.rope_factor:g}" for config in (work.before, work.after))
        work.other(key, f"at the same rope_factor, YaRN takes the trained length for another ({trained}), and turns so")
    else:
        work.same(key, f"{upto}; RoPE holds no table" + ("" if new < old else ", but was not trained beyond them"))


def _windows(work: Work, key: str) -> None:
    layers = range(work.before.num_layers)
    pairs = [[_reach(config, layer, work.shorter) for config in (work.before, work.after)] for layer in layers]
    if changed := [layer for layer in layers if pairs[layer][0] != pairs[layer][1]]:
        what = f"layer {changed[0]}" if len(changed) == 1 else f"{len(changed)} layers"
        work.other(key, f"the tokens of {what} see more or fewer tokens than they did")
    else:
        work.same(key, f"in texts of up to {work.shorter} tokens, each token sees those it saw")


def _reach(config: GPT2Config, layer: int, longest: int) -> int:
    """Tokens that a token of a layer can see in a text of `longest`, itself included."""
    windows = config.windows or (None,)
    return min(windows[layer % len(windows)] or longest, longest)


def _tie_head(work: Work, key: str) -> None:
    if not work.after.tie_head:
        work.weights[HEAD] = work.weights[EMBEDDING]
        work.made[HEAD] = "a copy of the token embedding"
        work.same(key, "the head is a copy of the token embedding")
        return
    rows = work.before.vocab_size
    if not torch.equal(work.weights[HEAD][:rows], work.weights[EMBEDDING][:rows]):
        raise work.refused(key, "the head is not the token embedding, and one would have to go", "keep tie_head false")
    work.drop([HEAD], "equal to the token embedding")
    work.same(key, "the head was equal to the token embedding")


def _activation(work: Work, key: str) -> None:
    if "swiglu" in (work.before.activation, work.after.activation):
        cause = "swiglu has three matrices where the others have two"
        raise work.refused(key, cause, f"keep activation {work.before.activation}")
    work.other(key, "the weights stay, but what stands between them is another function")


def _rope(work: Work, key: str) -> None:
    if work.after.position == "learned":
        work.same(key, "it says nothing about a model with learned positions")
    else:
        work.other(key, "no weight changes, but queries and keys turn by other angles")


_ROPE = ("position", "rope_base", "rope_scaling", "rope_factor")


def _qk_norm(work: Work, key: str) -> None:
    work.other(key, "no weight changes, but queries and keys get another length")


def _logit_softcap(work: Work, key: str) -> None:
    work.other(key, "no weight changes, but logits are bent in another way (their order stays)")


def _training_only(work: Work, key: str) -> None:
    work.same(key, "it says nothing about a model that is trained")


CHANGES: dict[str, Callable[[Work, str], None]] = {
    "position": _position,
    "norm": _norm,
    "bias": _bias,
    "num_kv_heads": _num_kv_heads,
    "num_experts": _num_experts,
    "experts_per_token": _experts_per_token,
    "max_seq_len": _max_seq_len,
    "windows": _windows,
    "tie_head": _tie_head,
    "activation": _activation,
    "rope_base": _rope,
    "rope_scaling": _rope,
    "rope_factor": _rope,
    "qk_norm": _qk_norm,
    "logit_softcap": _logit_softcap,
    "zero_init": _training_only,
    "dropout": _training_only,
}
"""What can be changed: every field of `GPT2Config` that is not `FIXED`."""


def show(value: Any) -> str:
    """A value as a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
