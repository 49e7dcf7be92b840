"""Training on two hosts, which share nothing but a network: the same curve, and what happens when that network goes.

What a user has to set: nothing where each host's name resolves to the address that the other reaches it by. Where it does
not, gloo listens on 127.0.0.1 and the processes do not find each other: then ``GLOO_SOCKET_IFNAME=eth0`` (the name of the
network card, from ``ip address``) on that host; on GPUs ``NCCL_SOCKET_IFNAME`` too. The text, or a named source, has to be
on every host; the run folder is on the first one only.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.recipe import load_config
from gpt2lab.train import train
from tests.hosts import ADDRESSES, Host, two_hosts, why_no_hosts
from tests.test_train import SETTINGS, Witness, flags, rows, sentences

STEPS = 60
LONG = SETTINGS | {
    "steps": STEPS, "batch_tokens": 128, "optim.learning_rate": 1e-3, "validate_every": 20, "checkpoint_every": 10,
    "sample_every": 0, "data.source": "text.txt", "out": "run",
}  # fmt: skip
"""Four passes a step, with dropout."""


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> None:
    if reason := why_no_hosts():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def alone(workplace: Path) -> list[dict[str, Any]]:
    """The rows of the same run in one process."""
    values = LONG | {"data.source": str(workplace / "text.txt"), "out": str(workplace / "run")}
    return rows(train(load_config([], flags(values)), Witness().console))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two folders with the text, one for each host."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(sentences())
    return tmp_path


def start(
    hosts: tuple[Host, Host], changes: dict[str, Any], processes: int = 1, **environment: str
) -> list[subprocess.Popen[str]]:
    """Start the run on both hosts through torchrun."""
    words = ["train", *flags(LONG | changes)]
    return [host.torchrun(*words, processes=processes, **environment) for host in hosts]


def start_by_hand(hosts: tuple[Host, Host], changes: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """The same without a launcher."""
    words = [sys.executable, "-m", "gpt2lab", "train", *flags(LONG | changes)]
    return [host.start(*words, **host.rank()) for host in hosts]


def wait_for_step(place: Path, processes: list[subprocess.Popen[str]], step: int) -> None:
    """Until the row of a step is in the first host's metrics."""
    path, deadline = place / "one" / "run" / "metrics.jsonl", time.monotonic() + 180
    while not path.exists() or path.read_bytes().count(b"\n") <= step:
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.001)


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait until a run is complete on both hosts."""
    for process in processes:
        said = process.communicate(timeout=180)[1]
        assert process.returncode == 0, said


def assert_same_curve(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(STEPS + 1))
    for key, within in (("loss", 1e-6), ("val_loss", 1e-6), ("grad_norm", 1e-5)):
        assert largest_difference(ours, theirs, key) <= within, key


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    values = [[row[key] for row in each if key in row] for each in (ours, theirs)]
    return max(abs(a - b) for a, b in zip(*values, strict=True))


def test_two_hosts_learn_what_one_process_does(place: Path, alone: list[dict[str, Any]]) -> None:
    """Replicas until both hosts lose their power; then shards go on, from the checkpoint that only the first host has."""
    with two_hosts(place) as hosts:
        processes = start_by_hand(hosts, {"system.strategy": "ddp"})
        wait_for_step(place, processes, STEPS // 2)
    before = rows(place / "one" / "run")
    assert STEPS // 2 <= before[-1]["step"] < STEPS
    with two_hosts(place) as hosts:
        finish(start(hosts, {"system.strategy": "fsdp"}))
    ours = rows(place / "one" / "run")
    assert_same_curve(ours, alone)
    assert largest_difference(ours, alone, "loss") > 0  # sums in another order: it was not one process that learned
    assert list((place / "one" / "run" / "checkpoints").iterdir())
    assert not (place / "two" / "run").exists() and list((place / "two" / "cache").iterdir())
    about = json.loads((place / "one" / "run" / "run.json").read_text())
    how = [(sitting["strategy"], sitting["processes"]) for sitting in about["sittings"]]
    assert how == [("ddp", 2), ("fsdp", 2)] and 0 < about["sittings"][1]["after_step"] <= before[-1]["step"]


def test_a_cable_that_is_pulled_ends_both_hosts(place: Path) -> None:
    """T25: within the time-out each names the other; without a launcher, whose exit code would be 1."""
    with two_hosts(place) as hosts:
        processes = start_by_hand(hosts, {"steps": 100_000, "system.timeout_seconds": 8})
        wait_for_step(place, processes, 10)
        hosts[0].unplug()
        said = [process.communicate(timeout=60)[1] for process in processes]
    for process, other, text in zip(processes, ("rank 1 of 2", ADDRESSES["one"]), said, strict=True):
        assert process.returncode == 6, text
        [line] = [line for line in text.splitlines() if line.startswith("gpt2lab: ")]
        assert other in line and "8 seconds" in line and "Fix: " in line
