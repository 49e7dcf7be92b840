"""The processes that train one model together: what they agree on, and how an error in one of them ends all of them.

They are started by ``gpt2lab train --system.num_processes=2``, torchrun or accelerate launch, which set RANK, WORLD_SIZE and
the like in the environment. A single process goes through the same code, in which then nothing is sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2lab.config import RunConfig, SystemConfig, to_yaml
from gpt2lab.errors import ConfigError, Interrupted, SaidElsewhere, as_lab_error
from gpt2lab.rendezvous import meet, place
from gpt2lab.system import StopSignals, choose_device
from gpt2lab.watch import Watch

T = TypeVar("T")


class Ranks:
    """The processes of a run, as seen by one of them.

    Attributes:
        rank, world_size: which of all processes this is, and how many there are.
        local_rank, local_size: the same on this machine.
        device: what this process computes on.
        watch: knows how far each process is.
    """

    def __init__(self, device: torch.device, store: dist.Store | None, watch: Watch) -> None:
        self.rank, self.world_size, self.local_rank, self.local_size = place()
        self.device, self.watch, self._store = device, watch, store

    @property
    def main(self) -> bool:
        """Whether this is the one process that speaks, and writes into the run folder."""
        return self.rank == 0

    def at(self, step: int, phase: str) -> None:
        """Say how far this process is: no sign for too long means that it hangs."""
        self.watch.at(step, phase)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in at least one process."""
        return bool(self.sum(torch.tensor(float(flag))).item()) if self.world_size > 1 else flag

    def same_in_all(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the main one's values, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def gather_line(self, text: str) -> list[str]:
        """What each process says, by rank, in up to 128 letters of ASCII; without the store, which ends with the launcher."""
        if self.world_size == 1:
            return [text]
        mine = torch.tensor(list(text.encode("ascii").ljust(128)), dtype=torch.uint8, device=self.device)
        lines = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(lines, mine)
        return [bytes(line.tolist()).decode("ascii").rstrip() for line in lines]

    def gather(self, text: str, key: str) -> list[str]:
        """What each process says under a key, by rank. Each key can be used once."""
        if self._store is None:
            return [text]
        self._store.set(f"{key}/{self.rank}", text)
        return [self._wait(f"{key}/{rank}").decode() for rank in range(self.world_size)]

    def from_main(self, text: str | None, key: str) -> str:
        """What the main process says under a key, in all of them. Each key can be used once."""
        if self._store is None:
            return text or ""
        if self.main:
            self._store.set(key, text or "")
        return self._wait(key).decode()

    def one_here_first(self, work: Callable[[], T], key: str) -> T:
        """Let one process of each machine do some work before its others do the same. Each key can be used once."""
        assert self._store is not None
        done = f"{key}/{self.rank - self.local_rank}"
        if self.local_rank > 0:
            self._wait(done)
        result = work()
        if self.local_rank == 0:
            self._store.set(done, "")
        return result

    def _wait(self, key: str) -> bytes:
        """The value of a key, once there is one; the watch ends this process when there never will be."""
        assert self._store is not None
        while not self._store.check([key]):
            time.sleep(0.01)
        return self._store.get(key)

    def last_word(self, error: BaseException) -> BaseException:
        """What this process ends with after an error: the first that fails says why, and all end with its exit code.

        A process that only notices that another is gone waits for that one's reason, or else says who died.
        """
        if self._store is None or not isinstance(error, Exception) or isinstance(error, SaidElsewhere):
            return error
        if isinstance(error, Interrupted):  # in all of them, and the main one says it
            return error if self.main else SaidElsewhere(error.exit_code)
        ours = as_lab_error(error)
        if ours is None and _lost_connection(error):
            return self.watch.explain_loss(error)
        code = ours.exit_code if ours is not None else 70
        first = self.watch.claim(code, str(ours or error))
        # The others read the claim in the store, which may be the first one's; and what ends first is what a launcher
        # ends the others for: let the one that speaks be heard.
        time.sleep(1)
        return first or error


@contextmanager
def join(config: RunConfig, stop: StopSignals) -> Iterator[Ranks]:
    """Meet the other processes; at the end, or after an error in any of them, all end together.

    Raises:
        ConfigError: they were not started as the settings say. ProcessError: they do not meet, or one died or hangs.
    """
    system = config.system
    rank, world, local_rank, _ = place()
    try:
        check_launch(system)
    except ConfigError as error:
        raise error if local_rank == 0 else SaidElsewhere(error.exit_code) from None
    device = choose_device(system.device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    grouped = world > 1 or system.strategy in ("ddp", "fsdp")
    store = meet(device, system.timeout_seconds, stop) if grouped else None
    watch = Watch(rank, local_rank, world, store if world > 1 else None, stop, system.timeout_seconds)
    ranks = Ranks(device, store if world > 1 else None, watch)
    try:
        with watch:
            refuse_differences(ranks, config)
            yield ranks
            watch.refuse_to_outlive()
            if world > 1:
                dist.barrier()  # else the first to end looks as if it had died
    except Exception as error:
        raise ranks.last_word(error) from error
    if grouped:
        dist.destroy_process_group()


def alone(config: RunConfig) -> Ranks:
    """One process, for a run that is only measured: nobody looks after it."""
    return Ranks(choose_device(config.system.device), None, Watch(0, 0, 1, None, StopSignals(), 1))


def check_launch(config: SystemConfig) -> None:
    """Refuse what the processes that there are cannot do.

    Raises:
        ConfigError: too many for the strategy, or another number than the settings say.
    """
    _, world, _, local = place()
    if config.num_processes not in (None, local):
        cause = f"{config.num_processes}, but {local} were started on this machine"
        raise ConfigError("processes miscounted", where="system.num_processes", cause=cause, fix="leave it out")
    if config.strategy == "single" and world > 1:
        cause = f"single, but {world} processes were started"
        raise ConfigError(
            "too many processes", where="system.strategy", cause=cause, fix="--system.strategy=ddp or fsdp"
        )
    if choose_device(config.device).type == "cuda" and local > torch.cuda.device_count():
        cause = f"{local} processes, but {torch.cuda.device_count()} GPUs on this machine"
        fix = "start one a GPU, or --system.device=cpu"
        raise ConfigError("too few GPUs", where="system.num_processes", cause=cause, fix=fix)


def refuse_differences(ranks: Ranks, config: RunConfig) -> None:
    """Refuse to train together with another gpt2lab or torch, or with other settings.

    Raises:
        ConfigError: naming the process that differs, and in what.
    """
    from gpt2lab import __version__

    mine = {
        "gpt2lab": __version__,
        "torch": torch.__version__,
        "device": ranks.device.type,
        "settings": to_yaml(config),
    }
    said = [json.loads(text) for text in ranks.gather(json.dumps(mine), "about")]
    for rank, theirs in enumerate(said):
        for what in mine:
            if theirs[what] != said[0][what]:
                pair = f"{theirs[what]}, not {said[0][what]}" if what != "settings" else "others than those of rank 0"
                fix = "install the same everywhere" if what != "settings" else "give all processes the same command"
                raise ConfigError("processes differ", where=f"rank {rank}", cause=f"{what}: {pair}", fix=fix)


def _lost_connection(error: Exception) -> bool:
    """Whether torch says that it cannot reach another process; gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "ncclRemoteError")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
