"""Faults in real processes: a fault costs time, never data, and what it says is one line."""

import ctypes
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import nn

from gpt2lab import checkpoint
from gpt2lab import train as training
from gpt2lab.data.batches import Batches
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.recipe import load_config
from gpt2lab.strategy import Single
from gpt2lab.system import StopSignals
from gpt2lab.tracking import read_rows
from gpt2lab.train import train
from tests.forked import Before, fork_command, in_pass, none_left, patch, wait_until
from tests.test_checkpoint import DONE, in_a_child
from tests.test_train import MEASURED, SETTINGS, Witness, assert_equal, flags, rows, state, terminate

ROOT = Path(__file__).parents[1]
STEPS = 60
LONG = SETTINGS | {"steps": STEPS, "data.source": "text.txt", "data.validation_tokens": 50, "out": "run"}


@pytest.fixture(scope="module", autouse=True)
def workplace(workplace: Path) -> Iterator[Path]:
    """The same one; commands find this source, and sum with one thread."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT / "src"))
        environment.setenv("OMP_NUM_THREADS", "1")
        yield workplace


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """The run that nothing interrupts."""
    values = LONG | {"data.source": str(workplace / "text.txt"), "out": str(workplace / "whole")}
    return train(load_config([], flags(values)), Witness().console)


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
    """Saving takes most of each step here, so most kills come while a checkpoint is written.

    A step is taken, and its row written, while the checkpoint of the one before is: the last whole one may be two behind.
    """
    moments, survived = random.Random(0), []
    for step in (0, 10, 20, 40):
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
        assert not troubles and (newest.state["step"] if newest else 0) >= len(kept) - 1 - 2
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


# --- Several processes, with the launcher -----------------------------------------------------------------------------

SHARED: dict[str, Any] = LONG | {"steps": 120, "validate_every": 0, "sample_every": 0, "checkpoint_every": 1}


def launch(place: Path, **changes: Any) -> subprocess.Popen[str]:
    """`gpt2lab train` on two processes, in a process group of its own."""
    words = command(**SHARED | {"system.num_processes": 2} | changes)
    return subprocess.Popen(words, cwd=place, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that a launcher has started, by their rank."""
    children = psutil.Process(launcher.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@contextmanager
def none_outlives(launcher: subprocess.Popen[str]) -> Iterator[list[psutil.Process]]:
    """Whatever is put into the list is killed at the end, if a test fails before it ends."""
    known: list[psutil.Process] = []
    try:
        yield known
    finally:
        for process in [*known, psutil.Process(launcher.pid)] if launcher.poll() is None else known:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.communicate()


@pytest.fixture(scope="module")
def shared(workplace: Path) -> Path:
    """The run of two processes that nothing interrupts."""
    with fork_command(2, ["train", *flags(SHARED | {"out": "shared"})], workplace) as ranks:
        assert ranks.wait() == [0, 0], ranks.everything_said
    return workplace / "shared"


def test_the_launcher_starts_what_was_killed_again(place: Path, shared: Path) -> None:
    """One rank, then both at once: the rest is gone in seconds, and the run is the one that nothing interrupted."""
    launcher = launch(place)
    with none_outlives(launcher) as known:
        for step, victims in ((5, [1]), (40, [0, 1])):
            wait_for_step(place, launcher, step)
            ranks = ranks_of(launcher)
            known += ranks.values()
            for victim in victims:
                ranks[victim].kill()
            assert none_left([rank.pid for rank in ranks.values()], 10)
        wait_for_step(place, launcher, 70)
        known += (last := list(ranks_of(launcher).values()))
        launcher.terminate()
        _, said = launcher.communicate(timeout=60)
        assert launcher.returncode == 75, said
        assert none_left([rank.pid for rank in last], 1)
    again = [line for line in said.splitlines() if "starting again from the last checkpoint" in line]
    assert again[0].startswith("rank 1 of 2") and "(1 of 3 restarts)" in again[0]
    assert len(again) == 2 and all("was killed by SIGKILL" in line for line in again)
    assert said.count("gpt2lab: stopped by SIGTERM") == 1 and "Traceback" not in said
    newest, troubles = checkpoint.latest(place / "run")
    assert newest is not None and not troubles
    assert newest.state["step"] == len(rows(place / "run")) - 1 >= 70, "a step was lost"
    assert rows(place / "run") == rows(shared)[: newest.state["step"] + 1]


def test_where_no_restart_is_left_the_launcher_says_who_was_killed(place: Path) -> None:
    launcher = launch(place, **{"system.restarts": 0})
    with none_outlives(launcher) as known:
        wait_for_step(place, launcher, 5)
        ranks = ranks_of(launcher)
        known += ranks.values()
        ranks[0].kill()
        _, said = launcher.communicate(timeout=30)
        assert launcher.returncode == 6 and none_left([rank.pid for rank in ranks.values()], 10)
    line = said.splitlines()[-1]
    assert f"rank 0 of 2, process {ranks[0].pid}" in line and "was killed by SIGKILL" in line and "Fix: " in line
    assert said.count("gpt2lab: ") == 1 and "Traceback" not in said


def test_control_c_and_the_death_of_the_launcher_lose_nothing(place: Path, shared: Path) -> None:
    """Ctrl-C goes to the whole process group, the launcher's death to nobody. Nothing in a step needs its store."""
    launcher = launch(place, checkpoint_every=0)
    with none_outlives(launcher) as known:
        wait_for_step(place, launcher, 5)
        known += (ranks := list(ranks_of(launcher).values()))
        os.killpg(launcher.pid, signal.SIGINT)
        _, said = launcher.communicate(timeout=60)
        assert launcher.returncode == 75, said
        assert none_left([rank.pid for rank in ranks], 1) and said.count("gpt2lab: stopped by SIGINT") == 1
    first = checkpoint.latest(place / "run")[0]
    assert first is not None and first.state["step"] == len(rows(place / "run")) - 1 >= 5

    launcher = launch(place, checkpoint_every=0, **{"system.compare_every": 1})
    with none_outlives(launcher) as known:
        wait_for_step(place, launcher, first.state["step"] + 5)
        known += (ranks := list(ranks_of(launcher).values()))
        launcher.kill()
        assert none_left([rank.pid for rank in ranks], 20)
    second = checkpoint.latest(place / "run")[0]
    assert second is not None and second.state["step"] == len(rows(place / "run")) - 1 > first.state["step"]
    with fork_command(2, ["train", *flags(SHARED)], place) as forks:
        assert forks.wait() == [0, 0], forks.everything_said
    assert rows(place / "run") == rows(shared)
    assert_equal(state(place / "run"), state(shared))


# --- Several processes, forked ----------------------------------------------------------------------------------------

APART: dict[str, Any] = LONG | {
    "steps": 12,
    "batch_tokens": 128,
    "validate_every": 4,
    "checkpoint_every": 4,
    "sample_every": 0,
}
"""Two passes a step in each of two processes."""


def in_last_pass(rank: int, act: Callable[[], None]) -> Before:
    """Let one rank act in its last pass of step 6."""
    return in_pass(rank, 6, 1, act)


def fail() -> None:
    raise RuntimeError("broken on purpose")


def fail_in(phase: str) -> Before:
    """Let rank 1 (rank 0 where only that has work) fail in a phase of a step after the first."""

    def before(rank: int) -> None:
        calls = itertools.count()

        def later(after: int, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*words: Any, **more: Any) -> Any:
                if next(calls) == after:
                    fail()
                return real(*words, **more)

            return call

        if rank != (0 if phase == "write" else 1):
            return
        match phase:
            case "data":
                patch(Batches, "__call__", later(5, Batches.__call__))
            case "forward":
                hook = later(100, lambda *_: None)
                nn.modules.module.register_module_forward_hook(lambda module, *_: (module.training and hook()) or None)
            case "backward":
                hook = later(5, lambda gradient: gradient)
                nn.modules.module.register_module_forward_hook(
                    lambda module, _, out: (
                        out.register_hook(hook) and None if isinstance(module, GPT2) and out.requires_grad else None
                    )
                )
            case "update":
                patch(Single, "step", later(5, Single.step))
            case "save":
                patch(Single, "weights", later(0, Single.weights))
            case "write":
                patch(checkpoint, "save", later(0, checkpoint.save))
            case "validate":
                patch(training, "validate", later(1, training.validate))

    return before


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("phase", ["data", "forward", "backward", "update", "save", "write", "validate"])
def test_an_error_in_one_process_ends_all_with_one_line(phase: str, strategy: str, place: Path) -> None:
    with fork_command(2, ["train", *flags(APART | {"system.strategy": strategy})], place, fail_in(phase)) as ranks:
        assert ranks.wait(30) == [70, 70]
        [line] = [line for line in ranks.everything_said.splitlines() if line.startswith("gpt2lab: ")]
    assert "broken on purpose" in line and "Traceback" not in ranks.everything_said
    assert len(rows(place / "run")) > 1


def loop_for_ever() -> None:
    while True:
        pass


def stop_oneself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_with_everything_locked() -> None:
    """What a C extension that never gives the GIL back does."""
    ctypes.PyDLL(None).sleep(1000)


@pytest.mark.parametrize("act", [loop_for_ever, stop_oneself, sleep_with_everything_locked], ids=lambda f: f.__name__)
def test_a_process_that_hangs_is_named_with_its_stacks(act: Callable[[], None], place: Path) -> None:
    words, began = ["train", *flags(APART | {"system.timeout_seconds": 4})], time.monotonic()
    with fork_command(2, words, place, in_last_pass(1, act)) as ranks:
        codes = ranks.wait(40) if act is not sleep_with_everything_locked else [ranks.wait_for(0, 40)]
        assert set(codes) == {6}, ranks.everything_said
        [line] = [line for line in ranks.everything_said.splitlines() if line.startswith("gpt2lab: ")]
    assert time.monotonic() - began < 30
    assert f"a process hangs (rank 1 of 2, process {ranks.pids[1]} on " in line
    assert "step 6, " in line or act is not loop_for_ever  # one that is stopped is where its last sign was
    assert "for 4 seconds" in line and "stacks.txt" in line and "rank 0" not in line
    stacks = (place / "run" / "stacks.txt").read_text()
    assert "=== rank 0 of 2" in stacks and "train_step" in stacks.split("=== rank 1 of 2")[0]
    if act is not sleep_with_everything_locked:
        assert act.__name__ in stacks.split("=== rank 1 of 2")[1]


def test_a_signal_to_one_process_stops_all(place: Path) -> None:
    for rank in (0, 1):
        out = f"run-{rank}"
        with fork_command(2, ["train", *flags(APART | {"out": out})], place, in_last_pass(rank, terminate)) as ranks:
            assert ranks.wait(30) == [75, 75]
            assert ranks.everything_said.count("gpt2lab: stopped by ") == 1
            assert "6 of 12 steps are done and saved" in ranks.everything_said
        newest, _ = checkpoint.latest(place / out)
        assert newest is not None and newest.state["step"] == 6


def test_a_second_signal_ends_it_at_once_and_the_others_follow(place: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)

    with fork_command(2, ["train", *flags(APART)], place, in_last_pass(1, twice)) as ranks:
        assert ranks.wait(30) == [6, -signal.SIGTERM]
    newest, troubles = checkpoint.latest(place / "run")
    assert newest is not None and newest.state["step"] == 4 and not troubles


def test_a_second_group_on_the_same_folder_is_refused_and_the_first_goes_on(place: Path) -> None:
    def wait_for_the_second() -> None:
        assert wait_until((place / "refused").exists, 30)

    (elsewhere := place / "elsewhere").mkdir()
    words = ["train", *flags(APART | {"out": str(place / "run")})]
    with fork_command(2, words, place, in_last_pass(0, wait_for_the_second)) as first:
        assert wait_until((place / "run" / "metrics.jsonl").exists, 30), first.everything_said
        (elsewhere / "text.txt").symlink_to(place / "text.txt")
        with fork_command(2, words, elsewhere) as second:
            assert second.wait(30) == [2, 2]
            assert second.everything_said.count("gpt2lab: run folder in use") == 1
            assert f"process {first.pids[0]} on " in second.everything_said
        (place / "refused").touch()
        assert first.wait(60) == [0, 0]
    assert [row["step"] for row in rows(place / "run")] == list(range(13))


def test_a_dozen_file_handles_are_enough(place: Path, whole: Path) -> None:
    """What too few bring, exit code 5, is in tests/test_cli.py; here are fewer than any system gives."""
    words = ["sh", "-c", 'ulimit -n 12; exec "$@"', "sh", *command()]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rows(place / "run") == rows(whole)


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
