"""How the processes of a run find each other: where the launcher says they are, and how long they may take to meet."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from gpt2lab.errors import ConfigError, Interrupted, LabError, ProcessError
from gpt2lab.system import StopSignals

MEET_SECONDS = 30.0
"""Processes that were started together have so long to meet."""


def place() -> tuple[int, int, int, int]:
    """Rank, number of processes, and both on this machine, as the launcher says; 0, 1, 0, 1 without one.

    Raises:
        ConfigError: the environment says something that cannot be.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ.get(name) for name in names}
    if given["RANK"] is None or given["WORLD_SIZE"] is None:
        return 0, 1, 0, 1
    try:
        rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank, local = int(given["LOCAL_RANK"] or rank), int(given["LOCAL_WORLD_SIZE"] or world)
        if not (0 <= rank < world and 0 <= local_rank < local <= world):
            raise ValueError
        if world > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
            raise ValueError
    except ValueError:
        shown = ", ".join(f"{name}={os.environ.get(name)}" for name in (*names, "MASTER_ADDR", "MASTER_PORT"))
        fix = "start through torchrun or accelerate launch, or unset them"
        raise ConfigError("bad launch", where="environment", cause=shown, fix=fix) from None
    return rank, world, local_rank, local


def meet(device: torch.device, timeout_seconds: int, stop: StopSignals) -> dist.Store:
    """Join the process group; the store is where the processes leave each other notes.

    Raises:
        ProcessError: the others are not found, or not all come. Interrupted: a signal came first.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # What waits longer is named by the watch first: torch's own time-out knows no names.
    timeout = timedelta(seconds=2 * timeout_seconds)
    if "MASTER_ADDR" not in os.environ:  # one process, and a strategy for many
        store: dist.Store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return store
    met: list[dist.Store] = []
    problems: list[Exception] = []

    def come() -> None:
        try:
            met.append(_rendezvous(backend, timeout))
        except Exception as error:
            problems.append(error)

    # In a thread, because torch may wait for an answer, or for a process that was never started, without end.
    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    deadline = time.monotonic() + MEET_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.1)
        if stop.received:
            fix = "give the same command again"
            raise Interrupted(f"stopped by {stop.received}", cause="the processes had not met yet", fix=fix)
    if met:
        return met[0]
    error = problems[0] if problems else TimeoutError(f"no answer within {MEET_SECONDS:g} seconds")
    if isinstance(error, LabError):
        raise error
    rank = place()[0]
    cause = f"rank {rank} on {socket.gethostname()}: {str(error).splitlines()[0]}"
    fix = (
        "check that all processes were started, and that the port is free; between hosts GLOO_SOCKET_IFNAME "
        "(NCCL_SOCKET_IFNAME) may have to name the network card, see `ip address`"
    )
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    raise ProcessError("the processes do not meet", where=where, cause=cause, fix=fix)


def _rendezvous(backend: str, timeout: timedelta) -> dist.Store:
    """Find the store, tell the others that this process is there, and make the process group.

    Raises:
        ConfigError: the address does not exist, or two processes have one rank, or they count each other differently.
        RuntimeError, ValueError, OSError: torch's own words for what else goes wrong.
    """
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError("no such host", where="MASTER_ADDR", cause=f"{address}: {error}", fix="mend it") from None
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts the processes again: notes of the dead must not be read.
    store = dist.PrefixStore(f"gpt2lab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    me = f"process {os.getpid()} on {socket.gethostname()}"
    there = store.compare_set(f"here/{rank}", "", me).decode()
    if there != me:
        raise ConfigError("a rank twice", where=f"RANK={rank}", cause=f"{there}, and {me}", fix="number them from 0")
    counted = store.compare_set("world", "", str(world)).decode()
    if counted != str(world):
        cause = f"{world} for rank {rank}, {counted} for another"
        raise ConfigError("processes miscounted", where="WORLD_SIZE", cause=cause, fix="give all of them the same")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return store
