"""Starting several processes on this machine, on torchrun's elastic agent, and starting them again when one of them dies."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

from gpt2lab.config import RunConfig
from gpt2lab.errors import Interrupted, ProcessError, SaidElsewhere
from gpt2lab.rendezvous import place
from gpt2lab.system import threads_of_each
from gpt2lab.watch import STACKS

WORTH_ANOTHER_TRY = (ProcessError.exit_code, 70)
"""Exit codes after which the same command may go better; a signal's number is negative and is one too."""


def must_launch(config: RunConfig) -> bool:
    """Whether this process has to start others: the settings ask for several, and no launcher made it one of them."""
    return (config.system.num_processes or 1) > 1 and "RANK" not in os.environ


def speaks() -> bool:
    """Whether this process is the one of its run that prints a result."""
    return place()[0] == 0


def launch(words: Sequence[str], config: RunConfig, say: Callable[[str], None]) -> None:
    """Run ``gpt2lab WORDS`` in `system.num_processes` processes, again from the last checkpoint after one has died.

    The first signal goes to all of them, which save and end; the second ends them at once.

    Raises:
        SaidElsewhere: they ended with an error, and have said which. ProcessError: one died, and no restarts are left.
    """
    processes, restarts = config.system.num_processes or 1, config.system.restarts
    for attempt in range(restarts + 1):
        stopped: list[int] = []
        failure = _run_once(words, processes, stopped)
        if failure is None:
            return
        rank, pid, code = failure
        last = bool(stopped) or attempt == restarts
        if code > 0 and (last or code not in WORTH_ANOTHER_TRY):
            raise SaidElsewhere(code)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        died = f"rank {rank} of {processes}, process {pid}"
        if last:
            fix = "give the same command again: it goes on from the last checkpoint"
            raise ProcessError("a process died", where=died, cause=f"it {how}; restarts used: {attempt}", fix=fix)
        say(f"{died}, {how}: starting again from the last checkpoint ({attempt + 1} of {restarts} restarts)")


def _run_once(words: Sequence[str], processes: int, stopped: list[int]) -> tuple[int, int, int] | None:
    """Start the processes and wait for their end; None, or the rank, pid and exit code of the first that failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the agent's own account of it, which says less
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(processes)))
    place = tempfile.TemporaryDirectory()
    os.environ[STACKS] = place.name
    logs = DefaultLogsSpecs(place.name)
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(os.getpid()), max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", monitor_interval=0.1, logs_specs=logs,
    )  # fmt: skip
    failures: list[Any] = []

    def run() -> None:
        try:
            elastic_launch(settings, sys.executable)("-m", "gpt2lab", *words)
        except ChildFailedError as error:
            failures.append(min(error.failures.items(), key=_guilt))
        except BaseException as error:
            failures.append(error)

    # Not in the main thread, where the agent would take the signals: its way with them kills after 30 seconds.
    agent = threading.Thread(target=run, daemon=True)
    with place, _signals_to_children(stopped):
        agent.start()
        while agent.is_alive():
            agent.join(0.2)
    if not failures:
        return None
    if isinstance(failures[0], BaseException):
        raise ProcessError(
            "the processes could not be started", cause=str(failures[0]), fix="see what it names"
        ) from failures[0]
    rank, failure = failures[0]
    return rank, failure.pid, failure.exitcode


def _guilt(failure: tuple[int, Any]) -> tuple[int, int]:
    """The smallest is the cause: what was killed, what failed, what stopped, what the agent ended because of the others."""
    rank, code = failure[0], failure[1].exitcode
    if code == -signal.SIGTERM:
        return 3, rank
    return (0 if code < 0 else 2 if code == Interrupted.exit_code else 1), rank


@contextmanager
def _signals_to_children(stopped: list[int]) -> Iterator[None]:
    """Pass SIGTERM, SIGINT and SIGHUP on to the processes that were started, which decide what they mean; note them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    main = threading.current_thread() is threading.main_thread()
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if main and hasattr(signal, name)]
    before = {kind: signal.signal(kind, pass_on) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
