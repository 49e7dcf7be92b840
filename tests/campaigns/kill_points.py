"""A process is killed at every file-system call of everything that writes folders; what is found then is old or new, and whole.

    python -m tests.campaigns.kill_points                 # every call of every kind of save
    python -m tests.campaigns.kill_points --points 20     # at most so many calls of each kind
    python -m tests.campaigns.kill_points --bits          # and every bit of a checkpoint is changed, one at a time

A forked child does the work under `strace -e inject=...:signal=SIGKILL:when=N`, which kills it as it enters its Nth call.
The test suite runs short ones (tests/test_checkpoint.py, tests/test_writer.py).
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt2lab.checkpoint import MODEL, latest, optimizer_tensors, step_folder, sweep
from gpt2lab.config import DataConfig
from gpt2lab.data.prepare import prepare
from gpt2lab.data.prepared import open_prepared
from gpt2lab.weights import save_model
from gpt2lab.weights.export import export_hf
from gpt2lab.writer import Writer
from tests.test_checkpoint import GOLDEN, TOKENIZER, learner_at, undetected, write
from tests.test_train import assert_equal, sentences, tree
from tests.test_writer import give

CALLS = "mkdir,rename,unlink,unlinkat,rmdir,openat,write,fsync,close"
DEADLINE_SECONDS = 120


@dataclass
class Kind:
    """A kind of save.

    Attributes:
        prepare: makes the place as it is before.
        work: what is killed.
        check: what is found in the place then; it says "old" or "new", and raises AssertionError for anything else.
        after: what the next start does; it must work, and leave nothing behind.
    """

    prepare: Callable[[Path], object]
    work: Callable[[Path], object]
    check: Callable[[Path], str]
    after: Callable[[Path], object]


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def run_before(run: Path, losses: dict[int, float], pinned: int | None = None, damaged: int | None = None) -> None:
    for step, loss in losses.items():
        write(run, step, val_loss=loss)
    if pinned is not None:
        step_folder(run, pinned).with_name(f"step-{pinned:08d}.keep").touch()
    if damaged is not None:
        (step_folder(run, damaged) / MODEL).write_bytes(b"")


def save_steps(run: Path, steps: list[int], keep: int, **options: Any) -> None:
    writer = Writer(run, keep, print)
    for step in steps:
        give(writer, step, **options)
    writer.close()


def check_run(run: Path, old: int, new: list[int]) -> str:
    """The latest is whole, of one of these steps, and nothing in it is of another."""
    newest, _ = latest(run)
    assert newest is not None, "there is no checkpoint"
    step = newest.state["step"]
    assert step in (old, *new), f"step {step} is there"
    model, optimizer = learner_at(step)
    assert_equal(newest.weights(), model.state_dict())
    assert_equal(newest.optimizer(), optimizer_tensors(model, optimizer))
    model, tokenizer = newest.open_model()
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    return "old" if step == old else "new"


def go_on(run: Path, work: Callable[[Path], object], expected: list[str]) -> None:
    """The next start sweeps, and comes to the same save again."""
    sweep(run)
    work(run)
    left = sorted(os.listdir(run / "checkpoints"))
    assert left == expected, f"left are {left}"


def saving(
    losses: dict[int, float], steps: list[int], keep: int, left: list[int], *, pinned: int | None = None,
    damaged: int | None = None, **options: Any,
) -> Kind:  # fmt: skip
    """A run with checkpoints of these losses saves some more steps."""
    work = partial(save_steps, steps=steps, keep=keep, **options)
    names = [f"step-{step:08d}" for step in left] + ([f"step-{pinned:08d}.keep"] if pinned is not None else [])
    return Kind(
        partial(run_before, losses=losses, pinned=pinned, damaged=damaged),
        work,
        partial(check_run, old=max(losses.keys() - {damaged}), new=steps),
        partial(go_on, work=work, expected=sorted(names)),
    )


# --- Folders of other kinds -------------------------------------------------------------------------------------------


def written_once(work: Callable[[Path], object]) -> Kind:
    """What writes one new folder, `out`: it is there as it should be, or not there."""
    with tempfile.TemporaryDirectory() as place:
        work(Path(place))
        expected = tree(Path(place) / "out")

    def check(place: Path) -> str:
        if not (place / "out").exists():
            return "old"
        assert tree(place / "out") == expected, "it is not what should be there"
        return "new"

    def after(place: Path) -> None:
        shutil.rmtree(place / "out", ignore_errors=True)
        work(place)
        assert check(place) == "new"
        left = sorted(os.listdir(place))
        assert left == ["out"], f"left are {left}"

    return Kind(lambda place: place.mkdir(), work, check, after)


def tokenise(text: Path, place: Path) -> None:
    prepare(DataConfig(source=str(text)), "bytes", folder=place / "out")
    open_prepared(place / "out")


def kinds(folder: Path) -> dict[str, Kind]:
    """Everything that is tried, by name; `folder` is for what they share."""
    text = folder / "text.txt"
    text.write_text(sentences())
    model, _ = learner_at(2)
    three, several = {1: 3.0, 2: 2.0, 3: 2.5}, {step: 5.0 - step / 10 for step in range(1, 7)} | {2: 1.0}
    return {
        "foreground": saving(three, [4], 2, [2, 3, 4], background=False),
        "foreground, several files": saving(three, [4], 2, [2, 3, 4], background=False, file_bytes=300),
        "background": saving(three, [4], 2, [2, 3, 4], background=True),
        "background, several files": saving(three, [4], 1, [2, 4], background=True, file_bytes=300),
        "background, twice": saving(three, [4, 5], 1, [2, 5], background=True),
        "rotation, best, pinned": saving(several, [7], 2, [2, 4, 6, 7], pinned=4, background=True),
        "over a damaged one": saving(three, [3], 2, [2, 3], damaged=3, background=False),
        "import": written_once(lambda place: save_model(place / "out", model, TOKENIZER)),
        "export": written_once(lambda place: export_hf(model, TOKENIZER, place / "out", check=False)),
        "tokenising": written_once(partial(tokenise, text)),
    }


# --- The killing ------------------------------------------------------------------------------------------------------


def traced(work: Callable[[], object], log: Path, call: str, number: int) -> int:
    """Do `work` in a forked process that is killed as one of its threads enters `call` that often; return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)  # until strace is there
            work()
            os._exit(0)
        finally:
            os._exit(99)
    os.waitpid(pid, os.WUNTRACED)
    words = f"strace -f -qq -o {log} -e trace={CALLS} -e inject={call}:signal=SIGKILL:when={number} -p {pid}"
    tracer = subprocess.Popen(words.split(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            sys.exit(f"strace cannot attach: {tracer.stderr and tracer.stderr.read()}")
        time.sleep(0.001)
    os.kill(pid, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tracer.communicate(timeout=DEADLINE_SECONDS)
    return code


def calls_in(log: Path) -> list[tuple[str, int]]:
    """Every call, with its number among those of its name in its thread: ("write", 1), ("write", 2)..."""
    lines = (re.match(r"(\d+) +(\w+)\(", line) for line in log.read_text().splitlines())
    counts = Counter((line[1], line[2]) for line in lines if line)
    return sorted({(call, n) for (_, call), count in counts.items() for n in range(1, count + 1)})


def try_kind(name: str, kind: Kind, folder: Path, most: int) -> tuple[int, int]:
    """Kill it at its calls; return at how many, and after how many of them all was well."""
    spare, place, log = folder / "spare", folder / "place", folder / "log"
    kind.prepare(spare)
    shutil.copytree(spare, place)
    assert traced(lambda: kind.work(place), log, CALLS, 2**16 - 1) == 0
    assert kind.check(place) == "new"
    calls = calls_in(log)
    points = calls[:: -(-len(calls) // most)]
    found: Counter[str] = Counter()
    for call, number in points:
        shutil.rmtree(place)
        shutil.copytree(spare, place)
        code = traced(lambda: kind.work(place), log, call, number)
        try:
            assert code == -signal.SIGKILL, f"it ended with {code}"
            found[kind.check(place)] += 1
            kind.after(place)
        except Exception as error:
            found["wrong"] += 1
            print(f"  {name}, killed at {call} {number}: {type(error).__name__}: {error}", flush=True)
    good = len(points) - found["wrong"]
    print(f"{name}: {good}/{len(points)} of {len(calls)} calls; old {found['old']}, new {found['new']}", flush=True)
    return len(points), good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10**6, help="calls of each kind")
    parser.add_argument("--kinds", nargs="*", help="some of them, by the beginning of their names")
    parser.add_argument("--bits", action="store_true", help="change every bit of a checkpoint")
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        sys.exit("this needs strace")
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    started, tried, good = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as shared:
        for name, kind in kinds(Path(shared)).items():
            if arguments.kinds and not name.startswith(tuple(arguments.kinds)):
                continue
            with tempfile.TemporaryDirectory() as folder:
                points, well = try_kind(name, kind, Path(folder), arguments.points)
            tried, good = tried + points, good + well
    print(f"{good}/{tried} kills left what was there before or what was to come ({time.monotonic() - started:.0f} s)")
    missed: list[str] = []
    if arguments.bits:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(GOLDEN / "format-2" / "step-00000002", Path(folder) / "golden")
            count, missed = undetected(Path(folder) / "golden", 8, verified_every=100)
        print(f"{count - len(missed)}/{count} changed bits were found; missed: {missed[:5]}")
    sys.exit(bool(missed or good < tried))


if __name__ == "__main__":
    main()
