"""How processes share a model: alone, as replicas (DDP), or in shards (FSDP2); the loop does not know which.

Accelerate chooses precision and wraps replicas. Shards are torch's own ``fully_shard``: Accelerate's FSDP becomes DDP on a
CPU without a word. Whatever the strategy, gradients are sums over all processes, and names and shapes are those of the code.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from gpt2lab import exact
from gpt2lab.config import ResolvedConfig, Strategy
from gpt2lab.distributed import Ranks
from gpt2lab.errors import ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.optim import make_optimizer


class Single:
    """One process with a whole model; what the others have in common, too.

    Attributes:
        model: with the names of the code; to validate, to write text.
        module: the same weights, wrapped for precision and strategy; called in training passes.
        optimizer: of what this process holds of the weights.
    """

    def __init__(self, model: GPT2, config: ResolvedConfig, accelerator: Accelerator, ranks: Ranks) -> None:
        self.model, self.config, self.accelerator, self.ranks = model, config, accelerator, ranks
        if config.system.activation_checkpointing:
            for block in model.layers:  # in place of a wrapping module, which would change the names
                vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
        wrapped = self.wrap()
        self.module = torch.compile(wrapped) if config.system.compile else wrapped
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(model, config.optim, exact=config.system.exact))
        passes = config.batch_tokens // (config.seq_len * config.micro_batch)
        self.sums = exact.make_sums(model, passes) if config.system.exact else None

    def wrap(self) -> nn.Module:
        """The module that training passes call."""
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)

    def one_pass(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass; the `last` of a step may exchange gradients."""
        if self.sums is not None:
            self.sums.last = last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add this pass's gradients to those of the step."""
        self.accelerator.backward(loss)
        if self.sums is not None:
            self.sums.add()

    def grad_norm(self) -> Tensor:
        """The norm of the step's gradients, which after this call are the sums over all passes and processes."""
        if self.sums is not None:
            self.sums.combine()
            return exact.total_norm(self.model.parameters())
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, rate: float, grad_norm: float) -> None:
        """Clip, and move the weights."""
        clip = self.config.optim.clip or math.inf
        if grad_norm > clip:
            scale = clip / (grad_norm + 1e-6)
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], scale)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        """Leave the weights as they are, and forget the step's gradients."""
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Whole weights on the CPU by their names, in the main process; {} in the others."""
        return self._whole(self.model.state_dict())

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `parameter/key`, whole, in the main process; {} in the others."""
        state = self.optimizer.state
        named = {f"{name}/{key}": value for name, p in self.model.named_parameters() for key, value in state[p].items()}
        # Adam's step count is a CPU scalar or a tensor, SGD may hold None before its first step.
        return self._whole({name: value for name, value in named.items() if isinstance(value, Tensor)})

    def digest(self) -> str:
        """``SHARD:SHA256`` of the weights that this process holds; replicas of a shard have the same."""
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in self.model.state_dict().items()}
        return f"{self.shard}:{exact.digest(local)}"

    @property
    def shard(self) -> int:
        """Which shard of the model this process holds; 0: all of it."""
        return 0

    def load_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Take whole weights, which only the main process needs to have."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self._spread(None if weights is None else weights[name], parameter))

    def load_optimizer(self, tensors: Mapping[str, Tensor] | None, key: str) -> None:
        """Take the optimizer's whole tensors, which only the main process needs to have; `key` is not used twice."""
        names = None if tensors is None else json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()})
        for name, shape in json.loads(self.ranks.from_main(names, f"optimizer/{key}")).items():
            parameter, _, key = name.rpartition("/")
            target = self.model.get_parameter(parameter)
            value = None if tensors is None else tensors[name]
            counts = shape != list(target.shape)  # Adam's steps; the rest has a number for each weight
            mine = self._broadcast(value, torch.zeros(shape)) if counts else self._spread(value, target)
            self.optimizer.state[target][key] = mine.to(target.device)

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather shards, one tensor at a time."""
        whole = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.ranks.main:
                whole[name] = full.detach().cpu()
        return whole

    def _spread(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        """The main process's tensor, or this process's shard of it."""
        whole = self._broadcast(tensor, torch.empty(like.shape, dtype=like.dtype, device=self.ranks.device))
        if isinstance(like, DTensor):
            return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        return whole

    def _broadcast(self, tensor: Tensor | None, empty: Tensor) -> Tensor:
        value = empty if tensor is None else tensor.detach().to(empty.device, empty.dtype).contiguous()
        if self.ranks.world_size > 1:
            dist.broadcast(value, src=0)
        return value


class Replicas(Single):
    """DDP (Li et al. 2020, arXiv:2006.15704): each process has a whole model; gradients meet in the last pass of a step."""

    def wrap(self) -> nn.Module:
        return self.accelerator.prepare_model(self.model)

    def one_pass(self, *, last: bool) -> AbstractContextManager[None]:
        meets = last and not self.config.system.exact
        return nullcontext() if meets else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        # DDP takes the mean over processes; we want the sum.
        super().backward(loss if self.config.system.exact else loss * self.ranks.world_size)


class Shards(Single):
    """FSDP2 (Zhao et al. 2023, arXiv:2304.11277): weights, gradients and optimizer are cut along their first dimension.

    A block is gathered when it computes. Embeddings, final norm and head are one group, because a tied head is the token
    embedding. Gradients are reduced after each pass, so that no process ever holds all of them; where copies of the model
    lie on several hosts (`shard_size`), these meet in the last pass only.
    """

    def wrap(self) -> nn.Module:
        module, device = super().wrap(), self.ranks.device.type
        size = self.config.system.shard_size or self.ranks.world_size
        replicas = self.ranks.world_size // size
        mesh = (
            init_device_mesh(device, (size,), mesh_dim_names=("shard",))
            if replicas == 1
            else init_device_mesh(device, (replicas, size), mesh_dim_names=("replicate", "shard"))
        )
        policy = CPUOffloadPolicy() if self.config.system.offload else OffloadPolicy()
        for part in (*self.model.layers, self.model):
            fully_shard(part, mesh=mesh, offload_policy=policy)
        for group in self._groups():
            group.set_gradient_divide_factor(1.0)  # sums
            group.set_force_sum_reduction_for_comms(True)  # gloo has no other kind
        # The losses of a pass are a view; nothing is done to them in place.
        warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
        return module

    def one_pass(self, *, last: bool) -> AbstractContextManager[None]:
        super().one_pass(last=last)
        for group in self._groups():
            group.set_requires_all_reduce(last)
        return nullcontext()

    @property
    def shard(self) -> int:
        return self.ranks.rank % (self.config.system.shard_size or self.ranks.world_size)

    def _groups(self) -> list[FSDPModule]:
        return [part for part in self.model.modules() if isinstance(part, FSDPModule)]


STRATEGIES: dict[str, type[Single]] = {"single": Single, "ddp": Replicas, "fsdp": Shards}


def make_strategy(model: GPT2, config: ResolvedConfig, accelerator: Accelerator, ranks: Ranks) -> Single:
    """The model wrapped as the settings say."""
    return STRATEGIES[config.system.strategy](model, config, accelerator, ranks)


def choose_strategy(name: Strategy, world_size: int) -> Strategy:
    """The strategy that a recipe names; auto: what `accelerate launch` was told, else single for one process, else ddp."""
    if name != "auto":
        return name
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    return "ddp" if world_size > 1 else "single"


def check_strategy(config: ResolvedConfig, world_size: int, device: str) -> None:
    """Refuse combinations that cannot work, all of them at once.

    Raises:
        ConfigError: naming them.
    """
    system, problems = config.system, []
    fsdp = system.strategy == "fsdp"
    if system.shard_size is not None and (not fsdp or world_size % system.shard_size):
        problems.append(f"shard_size {system.shard_size} needs fsdp, and must divide the {world_size} processes")
    if system.exact and system.shard_size not in (None, world_size):
        problems.append("exact adds over all processes, so it takes no shard_size")
    if system.offload and not (fsdp and device == "cuda"):
        problems.append("offload is for fsdp on GPUs")
    if system.precision == "fp16" and (fsdp or system.exact):
        problems.append("fp16 scales its gradients, which neither fsdp nor exact takes; bf16 needs no scale")
    if problems:
        cause = "; ".join(problems)
        raise ConfigError("settings that do not go together", where="system", cause=cause, fix="change one of them")
