"""What experts cost: a layer of them against one dense MLP that does the same work on each token.

The experts hold several times the weights. What routing, sorting and smaller products add to the time is the question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2lab.bench.timing import (
    TURN_SECONDS,
    alternate,
    at_least,
    choose_device,
    choose_dtype,
    environment,
    rate,
    shown,
    spread,
    write_result,
)
from gpt2lab.errors import ConfigError
from gpt2lab.folder import check_folder
from gpt2lab.model.mlp import MLP
from gpt2lab.model.moe import MoE, Routing
from gpt2lab.system import keep_freed_memory
from gpt2lab.tracking import Console

RATIO = "time of experts over dense"


@dataclass(frozen=True)
class ExpertsBench:
    """What is measured, and where.

    Attributes:
        tokens: in a step.
        ff_hidden_dim: inner width of one expert; the dense MLP is `experts_per_token` times as wide.
        rounds: of which the median counts.
        device: auto, cpu or cuda. precision: auto (bf16 on cuda, fp32 on cpu), fp32 or bf16.
        out: the folder for experts.json.
        turn_seconds: a step is repeated for so long in each of its turns.
    """

    tokens: int = 2048
    embed_dim: int = 768
    ff_hidden_dim: int = 1536
    num_experts: int = 8
    experts_per_token: int = 2
    rounds: int = 5
    device: str = "auto"
    precision: str = "auto"
    out: str = "runs/bench-experts"
    turn_seconds: float = TURN_SECONDS


def bench_experts(settings: ExpertsBench, console: Console) -> dict[str, Any]:
    """Measure a training step of both layers; write experts.json into `out`.

    Returns:
        What is in experts.json: ``machine``, ``rows`` and ``ratios``, and all that they were made from.

    Raises:
        ConfigError: settings that cannot work.
    """
    names = ("tokens", "embed_dim", "ff_hidden_dim", "num_experts", "experts_per_token", "rounds")
    at_least(1, **{name: getattr(settings, name) for name in names})
    if settings.experts_per_token > settings.num_experts:
        where = f"--experts-per-token={settings.experts_per_token}"
        cause = f"there are {settings.num_experts} experts"
        fix = f"--experts-per-token={settings.num_experts}"
        raise ConfigError("more experts a token than there are", where=where, cause=cause, fix=fix)
    device = choose_device(settings.device)
    precision, dtype = choose_dtype(settings.precision, device)
    folder = Path(settings.out)
    check_folder(folder)
    if device.type == "cpu":
        keep_freed_memory()  # as in training

    layers = make_layers(settings, device)
    steps = {who: make_step(layer, settings, device, dtype) for who, layer in layers.items()}
    console.say(f"{settings.tokens:,} tokens: {settings.rounds} rounds, dense and experts in turn")
    measured = alternate(steps, settings.rounds, device, turn_seconds=settings.turn_seconds)
    rows = []
    for who, layer in layers.items():
        what = f"feed-forward layer, forward and backward, {settings.tokens} tokens"
        about = {"parameters": sum(weight.numel() for weight in layer.parameters())}
        rows.append(rate(who, what, settings.tokens, measured.seconds(who)) | about)
    longer = spread(measured.ratios("experts", "dense"))
    routing = Routing()
    with torch.no_grad():
        layers["experts"](_tokens(settings, device), routing)
    result = environment(device, precision) | {
        "settings": asdict(settings),
        "rows": rows,
        "ratios": {RATIO: longer["median"]},
        "ranges": {RATIO: [longer["low"], longer["high"]]},
        "rounds": asdict(measured) | {"remark": measured.remark()},
        "tokens_of_each_expert": routing.counts[0].tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder / "experts.json", result)
    return result


def make_layers(settings: ExpertsBench, device: torch.device) -> dict[str, nn.Module]:
    """The two layers: as many weights work on a token in either."""
    torch.manual_seed(0)
    active = settings.experts_per_token * settings.ff_hidden_dim
    experts = MoE(settings.embed_dim, settings.ff_hidden_dim, settings.num_experts, settings.experts_per_token)
    return {"dense": MLP(settings.embed_dim, active).to(device), "experts": experts.to(device)}


def _tokens(settings: ExpertsBench, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(1, settings.tokens, settings.embed_dim, generator=generator, device=device)


def make_step(
    layer: nn.Module, settings: ExpertsBench, device: torch.device, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """One step of training a layer: it returns the output, and the gradients of the tokens and of each weight.

    With experts, the losses that keep their load even are part of it.
    """
    x = _tokens(settings, device).requires_grad_()
    direction = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        routing = Routing()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = layer(x, routing)
        loss = (out * direction).sum()
        if routing.counts:
            loss = loss + routing.balance_loss + routing.z_loss
        return out, *torch.autograd.grad(loss, leaves)

    return step


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    settings, [low, high] = result["settings"], result["ranges"][RATIO]
    lines = [
        f"feed-forward layer, forward and backward, {settings['tokens']:,} tokens of {settings['embed_dim']}: "
        f"{settings['num_experts']} experts of {settings['ff_hidden_dim']}, {settings['experts_per_token']} a token, "
        f"against a dense MLP of {settings['experts_per_token'] * settings['ff_hidden_dim']}",
        result["machine"],
        f"median of {settings['rounds']} rounds (lowest to highest); dense and experts in turn",
        "",
        f"{'':<8} {'parameters':>12}  {'tokens/s':>26}",
    ]
    for row in result["rows"]:
        lines.append(f"{row['who']:<8} {row['parameters']:>12,}  {shown(row):>26}")
    lines += ["", f"experts take {result['ratios'][RATIO]:.2f} times as long ({low:.2f} to {high:.2f})"]
    each = result["tokens_of_each_expert"]
    lines.append(f"an expert got {min(each):,} to {max(each):,} tokens; an even share is {sum(each) / len(each):,.0f}")
    return "\n".join([*lines, *filter(None, [result["rounds"]["remark"]])])
