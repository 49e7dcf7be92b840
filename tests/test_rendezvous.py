"""T26, processes that were started wrongly: each ends within 30 seconds with 2 or 6, and one line says what is wrong.

They are forked from this one, in which torch is loaded already, and look for each other for 2 seconds, not 30.
"""

import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

import gpt2lab
from gpt2lab import cli, rendezvous, train  # train: loaded once, here
from gpt2lab.errors import ConfigError, ProcessError
from tests.test_train import SETTINGS, flags, rows

DEADLINE_SECONDS = 30
CONFIG, PROCESS = ConfigError.exit_code, ProcessError.exit_code
LINE = re.compile(r"^gpt2lab: (.*Fix: .*)$", re.MULTILINE)
assert train.train is not None


@pytest.fixture
def port() -> int:
    """A free one."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def taken() -> Iterator[int]:
    """The port of a service that listens, and never answers."""
    with closing(socket.socket()) as service:
        service.bind(("127.0.0.1", 0))
        service.listen()
        yield int(service.getsockname()[1])


def rank(number: int, world: int, port: int, **changes: str) -> dict[str, str]:
    """What a launcher puts into a process's environment."""
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {key: str(value) for key, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    } | changes  # fmt: skip


def nothing() -> None: ...


class Forked:
    """``gpt2lab train`` in a forked process.

    Args:
        environment: as its launcher would set it; words: added to the command; before: done first.
    """

    def __init__(self, folder: Path, environment: dict[str, str], words: list[str], before: Callable[[], None]) -> None:
        folder.mkdir(exist_ok=True)
        self.said = folder / f"said-{len(list(folder.iterdir()))}"
        values = SETTINGS | {"data.source": str(folder.parent / "text.txt"), "out": str(folder / "run")}
        command = ["train", *flags(values | {"system.timeout_seconds": 8, "steps": 3}), *words]
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                sys.stdout = sys.stderr = self.said.open("a", buffering=1)  # pytest's own are not 1 and 2
                os.environ.update(environment)
                rendezvous.MEET_SECONDS = 2  # in place of 30: they are forks of one process
                before()
                code = cli.run(command)
            finally:
                os._exit(code)
        self.code: int | None = None

    def ended(self) -> bool:
        """Whether it has; then `code` is known."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None


def together(
    place: Path, *environments: dict[str, str], words: tuple[str, ...] = (), before: Callable[[], None] = nothing
) -> list[tuple[int | None, list[str]]]:
    """Exit code and lines of each process; None for one that is still there after the deadline.

    Args:
        words, before: of the last process only.
    """
    shutil.rmtree(place / "forked", ignore_errors=True)
    last = len(environments) - 1
    processes = []
    for number, environment in enumerate(environments):
        extra = (list(words), before) if number == last else ([], nothing)
        processes.append(Forked(place / "forked", environment, *extra))
        while not processes[-1].said.exists():
            time.sleep(0.001)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while sum(process.ended() for process in processes) < len(processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [(process.code, LINE.findall(process.said.read_text())) for process in processes]
    finally:
        for process in processes:
            if not process.ended():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)


@pytest.fixture(scope="module")
def place(workplace: Path) -> Iterator[Path]:
    """One folder for all tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
        yield workplace


def test_control_two_that_fit_train(place: Path, port: int) -> None:
    assert together(place, rank(0, 2, port), rank(1, 2, port)) == [(0, []), (0, [])]
    assert rows(place / "forked" / "run")[-1]["step"] == 3


def test_a_port_that_another_program_has(place: Path, taken: int) -> None:
    ended = together(place, rank(0, 2, taken), rank(1, 2, taken))
    assert [code for code, _ in ended] == [PROCESS, PROCESS]
    assert all(f"127.0.0.1:{taken}" in line for _, [line] in ended)
    assert "address already in use" in ended[0][1][0]


@pytest.mark.parametrize(("address", "code"), [("no-such-host.invalid", CONFIG), ("127.0.0.9", PROCESS)])
def test_a_wrong_address(place: Path, port: int, address: str, code: int) -> None:
    """Of a host that is not there, or on which nobody waits."""
    [(ended, [line])] = together(place, rank(1, 2, port, MASTER_ADDR=address))
    assert ended == code and address in line


@pytest.mark.parametrize("worlds", [(3, 3), (2, 3), (3, 2)], ids=str)
def test_a_number_of_processes_that_does_not_fit(place: Path, port: int, worlds: tuple[int, int]) -> None:
    ended = together(place, *(rank(number, world, port) for number, world in enumerate(worlds)))
    assert {code for code, _ in ended} <= {CONFIG, PROCESS}, ended
    assert any("processes" in line for _, lines in ended for line in lines)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (0, 0, 1)], ids=str)
def test_a_rank_that_two_processes_have(place: Path, port: int, numbers: tuple[int, ...]) -> None:
    ended = together(place, *(rank(number, 3, port) for number in numbers))
    assert {code for code, _ in ended} <= {CONFIG, PROCESS}, ended
    assert any(lines for _, lines in ended)


@pytest.mark.parametrize(
    ("module", "name"), [(gpt2lab, "gpt2lab: 9.9"), (torch, "torch: 9.9")], ids=["gpt2lab", "torch"]
)
def test_a_process_of_another_version(place: Path, port: int, module: object, name: str) -> None:
    ended = together(place, rank(0, 2, port), rank(1, 2, port), before=lambda: setattr(module, "__version__", "9.9"))
    assert [code for code, _ in ended] == [CONFIG, CONFIG]
    lines = [line for _, lines in ended for line in lines]
    assert lines and all("rank 1" in line and name in line for line in lines)


def test_a_process_of_other_settings(place: Path, port: int) -> None:
    ended = together(place, rank(0, 2, port), rank(1, 2, port), words=("--seed=3",))
    assert [code for code, _ in ended] == [CONFIG, CONFIG]
    lines = [line for _, lines in ended for line in lines]
    assert lines and all("rank 1" in line and "settings" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"RANK": "2"}, CONFIG, "RANK=2, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, CONFIG, "WORLD_SIZE=two"),
        ({"LOCAL_WORLD_SIZE": "4"}, CONFIG, "LOCAL_WORLD_SIZE=4"),
        ({"MASTER_PORT": "99999"}, PROCESS, "99999"),
        ({"MASTER_PORT": "http"}, PROCESS, "http"),
    ],
    ids=str,
)
def test_an_environment_that_cannot_be(place: Path, port: int, changes: dict[str, str], code: int, words: str) -> None:
    [(ended, [line])] = together(place, rank(0, 2, port, **changes))
    assert ended == code and words in line


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_lacks_something(place: Path, port: int, name: str) -> None:
    environment = rank(0, 2, port)
    del environment[name]
    [(code, [line])] = together(place, environment)
    assert code in (CONFIG, PROCESS) and name in line
