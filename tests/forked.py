"""The processes of one run as forks of this one: torch is loaded already, so two ranks are at work in a tenth of a second.

They find the environment that ``gpt2lab train --system.num_processes=2`` makes, and a store that outlives each of them, as
the launcher's does. What is about the launcher itself is tried with the launcher (tests/test_faults.py).
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import torch
import torch._dynamo  # or else each child imports it, which takes a second
import torch.distributed as dist

from gpt2lab import cli
from gpt2lab.data.batches import Batches

NOT_CAUGHT = 99
"""Exit code after an error that the work let through."""
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")

Before = Callable[[int], None]
"""What a process does with its rank before its work: it spoils something, or takes notes."""


class Forked:
    """Processes that do the same work, each with its rank; at the end of the ``with`` none of them is left.

    Args:
        work: what each does with its rank. What it returns must be fit for JSON.
        place: where they stand, and where what they say goes.
    """

    def __init__(self, world_size: int, work: Callable[[int], Any], place: Path) -> None:
        self.world_size, self.place = world_size, place
        self._keeper, alive, port = _keep_store() if world_size > 1 else (None, None, 0)
        self._alive = alive
        self.pids = [self._fork(rank, port, work) for rank in range(world_size)]
        self._codes: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if self._keeper is not None and self._alive is not None:
            os.close(self._alive)
            os.waitpid(self._keeper, 0)

    def wait(self, timeout: float = 90) -> list[int]:
        """The exit codes by rank; a signal's number is negative."""
        deadline = time.monotonic() + timeout
        return [self.wait_for(rank, deadline - time.monotonic()) for rank in range(self.world_size)]

    def wait_for(self, rank: int, timeout: float) -> int:
        """The exit code of one process."""
        deadline = time.monotonic() + timeout
        while rank not in self._codes:
            done, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if done:
                self._codes[rank] = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, f"rank {rank} does not end: {self.everything_said}"
            time.sleep(0.005)
        return self._codes[rank]

    def said(self, rank: int) -> str:
        """What a process wrote to stdout and stderr."""
        return (self.place / f"said-{rank}").read_text()

    @property
    def everything_said(self) -> str:
        return "".join(self.said(rank) for rank in range(self.world_size))

    def results(self, timeout: float = 90) -> list[Any]:
        """What the work returned in each process, once all have ended well."""
        codes = self.wait(timeout)
        assert not any(codes), f"{codes}: {self.everything_said}"
        return [json.loads((self.place / f"result-{rank}").read_text()) for rank in range(self.world_size)]

    def _fork(self, rank: int, port: int, work: Callable[[int], Any]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = NOT_CAUGHT
        try:
            if self._alive is not None:
                os.close(self._alive)
            _speak_into(self.place / f"said-{rank}")
            for name in LAUNCH:
                os.environ.pop(name, None)
            if self.world_size > 1:
                size, one = str(self.world_size), str(rank)
                values = (one, size, one, size, "127.0.0.1", str(port), "forked")
                os.environ.update(dict(zip(LAUNCH, values, strict=True)), TORCHELASTIC_USE_AGENT_STORE="True")
            os.chdir(self.place)
            torch.set_num_threads(1)
            (self.place / f"result-{rank}").write_text(json.dumps(work(rank)))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def fork_command(world_size: int, words: list[str], place: Path, before: Before | None = None) -> Forked:
    """``gpt2lab WORDS`` in several processes; `before` is called in each with its rank."""

    def work(rank: int) -> None:
        if before is not None:
            before(rank)
        raise SystemExit(cli.run(words))

    return Forked(world_size, work, place)


def patch(owner: object, name: str, value: object) -> None:
    """Replace an attribute, which must be there, for the rest of this process: nothing puts it back."""
    pytest.MonkeyPatch().setattr(owner, name, value)


def in_pass(rank: int, step: int, micro_step: int, act: Callable[[], object]) -> Before:
    """Let one rank act when it is to read the text of a pass; steps count from 1, passes from 0."""

    def before(this: int) -> None:
        draw = Batches.__call__

        def drawn(batches: Batches, index: int, number: int) -> Any:
            if (this, index + 1, number) == (rank, step, micro_step):
                act()
            return draw(batches, index, number)

        patch(Batches, "__call__", drawn)

    return before


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Whether something is so within a time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def none_left(pids: list[int], seconds: float) -> bool:
    """Whether all these processes are gone after so long."""
    return wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), seconds)


def _speak_into(path: Path) -> None:
    """Send stdout and stderr, of Python and of what lies below it, into a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _keep_store() -> tuple[int, int, int]:
    """Fork a process that keeps the ranks' store until its pipe is closed; return its pid, the pipe, and the store's port."""
    said, say = os.pipe()
    alive, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(say, str(store.port).encode())
        os.read(alive, 1)
        os._exit(0)
    port = int(os.read(said, 16))
    for handle in (said, say, alive):
        os.close(handle)
    return pid, hold, port
