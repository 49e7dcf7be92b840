"""Who is missing: each process says every second how far it is, and when nothing goes on, who holds it up is named.

torch notices a dead process by its closed connection and a stopped one after half an hour, and names neither. Here a thread
leaves a note in the store that all processes share, reads those of the others once its own process has stood still for too
long, and ends the run with the rank, the step, the phase and the stacks of whoever is behind.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from gpt2lab.errors import ProcessError, SaidElsewhere
from gpt2lab.system import StopSignals

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
"""In the environment of a process that torchrun, accelerate launch or `gpt2lab train` started."""
STACKS = "GPT2LAB_STACKS"
"""The environment variable with the folder for the stacks of the processes that `gpt2lab train` starts."""
GRACE_SECONDS = 5
"""How long a process may take to end by itself once another has said why it failed."""
FAILURE = "failure"
AGAIN = "give the same command again: it goes on from the last checkpoint"
PATIENCE = {"start": 30, "save": 10}
"""How many times longer than usual a phase may take in which one process works and the others wait for it."""
FIRST_STEP_PATIENCE = 10
"""The same of the first step, in which models are compiled."""


class Watch:
    """A thread that looks after the processes of a run while the main one trains.

    Args:
        store: where the processes leave each other notes; None for one process alone.
        stop: is told when the launcher has died: nobody would pass on its signals any more.
        timeout_seconds: standing still for so long means that someone hangs.
    """

    def __init__(
        self,
        rank: int,
        local_rank: int,
        world_size: int,
        store: dist.Store | None,
        stop: StopSignals,
        timeout_seconds: int,
    ) -> None:
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self.stop, self.timeout = stop, timeout_seconds
        self.folder: Path | None = None
        # A connection of its own: one that waits is blocked for others.
        self._store = store.clone() if store is not None else None  # type: ignore[attr-defined]
        self._period = min(1.0, timeout_seconds / 8)
        self._step, self._phase, self._count, self._beats = 0, "start", 0, 0
        self._first_step: int | None = None
        self._moved = self._answered = time.monotonic()
        self._ended = threading.Event()
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        self._failed_at: float | None = None

    def at(self, step: int, phase: str) -> None:
        """The main thread is here now. Called equally often in all processes, so the smallest count is behind."""
        self._step, self._phase, self._count = step, phase, self._count + 1
        self._first_step = step if self._first_step is None else self._first_step
        self._moved = time.monotonic()

    def waiting(self) -> None:
        """The main thread waits for something outside, and does not hang."""
        self._moved = time.monotonic()

    def __enter__(self) -> Watch:
        self._stacks = stack_file(os.getpid()).open("w")
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        work = [self._look] * (self._store is not None or self._parent is not None)
        work += [self._mind_the_store] * (self._store is not None)
        self._threads = [threading.Thread(target=target, daemon=True, name="watch") for target in work]
        if self._store is not None:
            self._beat()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self._period)
        if hasattr(faulthandler, "register"):
            faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        stack_file(os.getpid()).unlink(missing_ok=True)

    def claim(self, exit_code: int, text: str) -> SaidElsewhere | None:
        """Say first why the run fails: None; or else the end that another process, which was first, means for this one."""
        if self._store is None:
            return None
        note = {"rank": self.rank, "host": socket.gethostname(), "exit_code": exit_code, "text": text}
        try:
            first = json.loads(self._store.compare_set(FAILURE, "", json.dumps(note)))
        except (RuntimeError, ValueError):  # the launcher, and the store with it, is gone
            return None
        return None if first["rank"] == self.rank else self._follow(first)

    def refuse_to_outlive(self) -> None:
        """End here, too, where a process was named for a failure and went on: one that was stopped is woken for its stacks.

        Raises:
            SaidElsewhere: it was.
        """
        if (note := self._failure()) is not None:
            time.sleep(2)  # whoever named it is still reading its stacks
            raise SaidElsewhere(int(note["exit_code"]))

    def _follow(self, first: dict[str, Any]) -> SaidElsewhere:
        """The end of this process after that of another; on another machine nobody has read its line yet."""
        if first["host"] != socket.gethostname() and self.local_rank == 0:
            print(f"gpt2lab: rank {first['rank']} on {first['host']}: {first['text']}", file=sys.stderr, flush=True)
        return SaidElsewhere(int(first["exit_code"]))

    def explain_loss(self, error: Exception) -> Exception:
        """Why another process could not be reached: it failed and said so, or it died without a word."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if (note := self._failure()) is not None:
                return self._follow(note)
            if dead := self._dead():
                first = self.claim(ProcessError.exit_code, f"{dead} died")
                if first is None and self._parent is not None:  # the launcher names the signal, too
                    return SaidElsewhere(ProcessError.exit_code)
                cause = "it left without a word"
                return first or ProcessError("a process died", where=dead, cause=cause, fix=AGAIN)
            time.sleep(0.1)
        cause = f"rank {self.rank} cannot reach another process in {self._phase}: {str(error).splitlines()[0]}"
        lost = ProcessError("connection lost", where=f"step {self._step}", cause=cause, fix=AGAIN)
        return self.claim(lost.exit_code, str(lost)) or lost

    def _look(self) -> None:
        """The thread: until the run ends, or has to be ended."""
        while not self._ended.wait(self._period):
            if self._parent is not None and os.getppid() != self._parent:
                self.stop.ask("the end of its launcher")
            if self._store is None:
                continue
            with suppress(RuntimeError):  # the store is gone with its launcher
                self._beat()
                self._end_with_the_others()
                if time.monotonic() - self._moved > self.timeout and self._failure() is None:
                    self._accuse()
            self._answered = time.monotonic()

    def _mind_the_store(self) -> None:
        """A second thread: where the network is cut in two, the first one waits for the store, and would for ever."""
        late = 0
        while not self._ended.wait(self._period):
            # Twice, because a process that was stopped itself must first get its answer.
            late = late + 1 if time.monotonic() - self._answered > self.timeout + 3 * self._period else 0
            if late > 1:
                where = (
                    f"rank {self.rank} of {self.world_size} on {socket.gethostname()}, step {self._step}, {self._phase}"
                )
                cause = f"no answer for {self.timeout} seconds from {os.environ.get('MASTER_ADDR', 'the main process')}"
                error = ProcessError(
                    "connection lost", where=where, cause=cause, fix=f"look at the network, and {AGAIN}"
                )
                print(f"gpt2lab: {error}", file=sys.stderr, flush=True)
                os._exit(error.exit_code)

    def _beat(self) -> None:
        self._beats += 1
        note = {
            "beat": self._beats, "count": self._count, "step": self._step, "phase": self._phase,
            "patience": max(PATIENCE.get(self._phase, 1), FIRST_STEP_PATIENCE if self._step == self._first_step else 1),
            "pid": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        assert self._store is not None
        self._store.set(f"beat/{self.rank}", json.dumps(note))

    def _beats_of_all(self) -> list[dict[str, Any] | None]:
        assert self._store is not None
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]

    def _failure(self) -> dict[str, Any] | None:
        """What the first process that failed said, if one has."""
        try:
            if self._store is not None and self._store.check([FAILURE]):
                return dict(json.loads(self._store.get(FAILURE)))
        except (RuntimeError, ValueError):
            pass
        return None

    def _end_with_the_others(self) -> None:
        """Another has failed: the main thread usually hears of it from a broken connection; if not, end here."""
        note = self._failure()
        if note is None or note["rank"] == self.rank:
            return
        self._failed_at = self._failed_at or time.monotonic()
        if time.monotonic() - self._failed_at > GRACE_SECONDS:
            os._exit(int(note["exit_code"]))

    def _dead(self) -> str:
        """The processes of this machine that are gone, in words; empty if none is."""
        with suppress(RuntimeError):
            beats = enumerate(self._beats_of_all())
            gone = [(rank, beat) for rank, beat in beats if beat and _is_here(beat) and not _is_alive(beat["pid"])]
            return "; ".join(self._name(rank, beat) for rank, beat in gone)
        return ""

    def _accuse(self) -> None:
        """Nothing has gone on for too long: name whoever gives no sign, or else is behind, and end the run."""
        before = self._beats_of_all()
        time.sleep(2.5 * self._period)
        if time.monotonic() - self._moved <= self.timeout:
            return
        self._beat()
        now = self._beats_of_all()
        silent = [rank for rank, beat in enumerate(now) if rank != self.rank and _same_beat(beat, before[rank])]
        least = min(beat["count"] for beat in now if beat)
        behind = [rank for rank, beat in enumerate(now) if beat and beat["count"] == least]
        patience = max(beat["patience"] for beat in now if beat and beat["count"] == least)
        if not silent and time.monotonic() - self._moved < patience * self.timeout:
            return
        accused = silent or behind
        named = "; ".join(self._name(rank, now[rank]) for rank in accused)
        cause = f"no sign for {self.timeout} seconds" if silent else f"stands still for {self.timeout} seconds"
        if self.claim(ProcessError.exit_code, f"a process hangs: {named}: {cause}") is not None:
            return
        where_stacks = self._gather_stacks([(rank, now[rank]) for rank in range(self.world_size)])
        error = ProcessError(
            "a process hangs",
            where=named,
            cause=f"{cause}; the stacks are in {where_stacks}",
            fix=f"look at them, and {AGAIN}",
        )
        print(f"gpt2lab: {error}", file=sys.stderr, flush=True)
        os._exit(ProcessError.exit_code)

    def _gather_stacks(self, beats: list[tuple[int, dict[str, Any] | None]]) -> Path:
        """Where every thread of every process of this machine is, in one file; a stopped process is woken for it."""
        here = [(rank, beat) for rank, beat in beats if beat and _is_here(beat)]
        faulthandler.dump_traceback(self._stacks, all_threads=True)  # of this process, with its other threads held
        for rank, beat in here:
            if rank != self.rank:
                with suppress(ProcessLookupError, PermissionError):
                    _signal_main_thread(beat["pid"], signal.SIGUSR1)
                    os.kill(beat["pid"], signal.SIGCONT)
        time.sleep(0.5)
        folder = self.folder if self.folder is not None and self.folder.is_dir() else Path(tempfile.gettempdir())
        path = folder / "stacks.txt"
        parts = []
        for rank, beat in here:
            with suppress(OSError):
                parts.append(f"=== {self._name(rank, beat)}\n{stack_file(beat['pid']).read_text()}")
        with suppress(OSError):
            path.write_text("\n".join(parts))
        return path

    def _name(self, rank: int, beat: dict[str, Any] | None) -> str:
        if beat is None:
            return f"rank {rank} of {self.world_size}, which never came"
        place = f"process {beat['pid']} on {beat['host']}"
        return f"rank {rank} of {self.world_size}, {place}, step {beat['step']}, {beat['phase']}"


def stack_file(pid: int) -> Path:
    """Where a process writes its stacks when it gets SIGUSR1."""
    return Path(os.environ.get(STACKS) or tempfile.gettempdir()) / f"gpt2lab-{pid}.stacks"


def _signal_main_thread(pid: int, number: int) -> None:
    """Signal another process in its main thread, which then says where it stood before it moves on.

    A signal to a process goes to any of its threads; a stopped one's main thread might be elsewhere by then.
    """
    try:
        tgkill = ctypes.CDLL(None).tgkill  # on Linux; `signal` has it for this process's threads only
    except (AttributeError, OSError, TypeError):
        os.kill(pid, number)
    else:
        tgkill(pid, pid, number)


def _same_beat(now: dict[str, Any] | None, before: dict[str, Any] | None) -> bool:
    return now is None or (before is not None and now["beat"] == before["beat"])


def _is_here(beat: dict[str, Any]) -> bool:
    return bool(beat["host"] == socket.gethostname())


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
