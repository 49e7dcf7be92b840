"""Faults in real processes: a fault costs time, never data, and what it says is one line."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab import checkpoint
from gpt2lab.recipe import load_config
from gpt2lab.system import StopSignals
from gpt2lab.tracking import read_rows
from gpt2lab.train import train
from tests.test_checkpoint import DONE, in_a_child
from tests.test_train import MEASURED, SETTINGS, Witness, assert_equal, flags, rows, sentences, state

ROOT = Path(__file__).parents[1]
STEPS = 60
LONG = SETTINGS | {"steps": STEPS, "data.source": "text.txt", "data.validation_tokens": 50, "out": "run"}


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2LAB_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """The run that nothing interrupts."""
    (workplace / "text.txt").write_text(sentences())
    values = LONG | {"data.source": str(workplace / "text.txt"), "out": str(workplace / "whole")}
    return train(load_config([], flags(values)), Witness().console)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the text, in which `run` will be."""
    (tmp_path / "text.txt").write_text(sentences())
    return tmp_path


def command(*words: str, **changes: Any) -> list[str]:
    return [sys.executable, "-m", "gpt2lab", "train", *flags(LONG | changes), *words]


def start(place: Path, **changes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command(**changes), cwd=place, stderr=subprocess.PIPE, text=True)


def wait_for_step(place: Path, process: subprocess.Popen[str], step: int) -> None:
    """Until the row of a step is in the metrics."""
    path, deadline = place / "run" / "metrics.jsonl", time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") <= step:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.001)


def finish(place: Path, **changes: Any) -> str:
    """Give the command again, until it is done; return what it said."""
    done = subprocess.run(command(**changes), cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_kills_at_random_moments_leave_no_trace(place: Path, whole: Path) -> None:
    """Saving takes most of each step here, so most kills come while a checkpoint is written."""
    moments, survived = random.Random(0), []
    for step in (0, 8, 16, 24, 32, 40):
        process = start(place, checkpoint_every=1)
        wait_for_step(place, process, step)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        written = list(read_rows(place / "run" / "metrics.jsonl"))
        kept = [{key: value for key, value in row.items() if key not in MEASURED} for row in written]
        assert kept == rows(whole)[: len(kept)] and len(kept) > step
        newest, troubles = checkpoint.latest(place / "run")
        assert not troubles and (newest.state["step"] if newest else 0) >= len(kept) - 2
        survived.append(len(kept) - 1)
    print(f"killed after steps {survived}")
    assert finish(place, checkpoint_every=1).count("going on after step") == 1
    assert rows(place / "run") == rows(whole)
    assert_equal(state(place / "run"), state(whole))
    assert len(os.listdir(place / "run" / "checkpoints")) == 2


def test_sigterm_and_sigint_lose_nothing(place: Path, whole: Path) -> None:
    for kind, step in ((signal.SIGTERM, 3), (signal.SIGINT, 20)):
        process = start(place, checkpoint_every=0)
        wait_for_step(place, process, step)
        process.send_signal(kind)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 75
        last = said.splitlines()[-1]
        assert last.startswith(f"gpt2lab: stopped by {kind.name} (run): ") and "Fix: " in last
        assert "Traceback" not in said
        newest, troubles = checkpoint.latest(place / "run")
        assert newest is not None and not troubles
        assert newest.state["step"] == len(rows(place / "run")) - 1 >= step
        assert f"{newest.state['step']} of {STEPS} steps are done" in last
    assert f"going on after step {newest.state['step']}" in finish(place, checkpoint_every=0)
    assert rows(place / "run") == rows(whole)
    assert_equal(state(place / "run"), state(whole))


def one_signal(kind: signal.Signals) -> Callable[[], None]:
    def work() -> None:
        with StopSignals() as stop:
            signal.raise_signal(kind)
            os._exit(DONE if stop.received == kind.name else 1)

    return work


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_first_signal_is_noted(kind: signal.Signals) -> None:
    assert in_a_child(one_signal(kind)) == DONE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_ends_it_at_once(first: signal.Signals, second: signal.Signals) -> None:
    def work() -> None:
        with StopSignals():
            signal.raise_signal(first)
            signal.raise_signal(second)
            os._exit(DONE)

    assert in_a_child(work) == -second


def test_closed_pipes_do_not_stop_it(place: Path, whole: Path) -> None:
    """``gpt2lab train ... --json 2>&1 | head -1``."""
    process = subprocess.Popen(command("--json"), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.readline().startswith("run ")
    process.stderr.close()
    assert process.wait(timeout=300) == 0
    assert rows(place / "run") == rows(whole)
    assert_equal(state(place / "run"), state(whole))


def test_a_second_process_on_the_same_folder_is_refused(place: Path) -> None:
    first = start(place)
    try:
        wait_for_step(place, first, 3)
        first.send_signal(signal.SIGSTOP)  # it is still there, and slow
        second = subprocess.run(command(), cwd=place, capture_output=True, text=True, timeout=300)
        assert second.returncode == 2 and str(first.pid) in second.stderr
    finally:
        first.kill()
        first.communicate()


# --- Disks ------------------------------------------------------------------------------------------------------------


def mounted(options: str, script: str, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a tmpfs at `run` that only it sees."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here: `unshare -m` needs Linux and root")
    (place / "run").mkdir()
    words = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f"mount -t tmpfs -o {options} tmpfs run || exit 99\n{script}",
        "sh",
        *arguments,
    ]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
    if done.returncode == 99:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    return done


def test_a_full_disk_leaves_the_checkpoint_before(place: Path, whole: Path) -> None:
    """There is room for two checkpoints and a half. The second try has more, as the error advises."""
    script = """
        "$@"; echo "exit $?"; cp -a run full
        mount -o remount,size=16m run
        "$@"; echo "exit $?"; cp -a run after
    """
    done = mounted("size=900k", script, place, *command(checkpoint_every=5))
    assert done.stdout.split() == ["exit", "5", "exit", "0"], done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("gpt2lab: ")]
    assert "disk full" in line and "Fix: free some space" in line and "Traceback" not in done.stderr
    newest, troubles = checkpoint.latest(place / "full")
    assert newest is not None and newest.state["step"] == 10 and not troubles
    assert sorted(os.listdir(place / "full" / "checkpoints")) == ["step-00000005", "step-00000010"]
    assert rows(place / "after") == rows(whole)
    assert_equal(state(place / "after"), state(whole))


def test_a_read_only_folder_is_refused(place: Path) -> None:
    done = mounted("ro", '"$@"', place, *command())
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "run" in done.stderr and "Fix: " in done.stderr
