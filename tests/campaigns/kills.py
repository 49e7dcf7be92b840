"""One run, killed again and again at random moments: no loss differs from the run that nobody killed.

    python -m tests.campaigns.kills --kills 1000 --minutes 20 --strategy ddp

A life is a fork of a process that has torch loaded. It ends by SIGKILL: of the one process, or of one or both of two, and
then the other must end by itself. When a run completes, its weights are compared and the next begins. What was written when
a life ends is compared row for row; rows after the newest checkpoint are computed again in the next life.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2lab import checkpoint, train
from tests.campaigns.resume import hashes
from tests.forked import Forked, fork_command
from tests.test_train import SETTINGS, flags, rows, sentences

STEPS = 400


@dataclass
class Tally:
    """What happened so far."""

    kills: int = 0
    replayed: int = 0
    differing: int = 0
    completed: int = 0
    longest_end: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.replayed} rows computed again, {self.differing} lives with another loss, "
            f"{self.completed} runs completed with the same weights; the survivors of a kill ended within "
            f"{self.longest_end:.1f} s"
        )


def settings(strategy: str, **changes: Any) -> dict[str, Any]:
    """A run that saves every third step, so that most kills make it compute something again."""
    return SETTINGS | {
        "steps": STEPS,
        "batch_tokens": 64,
        "micro_batch": 1,
        "data.source": "text.txt",
        "data.validation_tokens": 17,
        "validate_every": 50,
        "sample_every": 0,
        "checkpoint_every": 3,
        "system.strategy": strategy,
        "system.compare_every": 10,
    } | changes  # fmt: skip


def live_and_die(life: Forked, moment: float, victims: list[int]) -> tuple[bool, float]:
    """Let a run go on for so many seconds, then kill some of its processes.

    Returns:
        Whether it was complete before, and the seconds until all had ended.
    """
    time.sleep(moment)
    for rank in victims:
        os.kill(life.pids[rank], signal.SIGKILL)  # not waited for: its number is still its own
    began = time.monotonic()
    codes = life.wait(60)
    killed = [code for code in codes if code == -signal.SIGKILL]
    if not killed:
        assert set(codes) == {0}, life.everything_said
    else:
        assert all(code in (-signal.SIGKILL, 6, 0) for code in codes), f"{codes}: {life.everything_said}"
    return not killed, time.monotonic() - began


def campaign(kills: int, minutes: float, strategy: str, place: Path, seed: int = 0) -> Tally:
    """Kill a run so often, or for so long; every loss is compared."""
    draw, tally, processes = random.Random(seed), Tally(), 1 if strategy == "single" else 2
    (place / "text.txt").write_text(sentences())
    whole, run = place / "whole", place / "run"
    with fork_command(processes, ["train", *flags(settings(strategy, out="whole"))], place) as ranks:
        assert ranks.wait(600) == [0] * processes, ranks.everything_said
    truth, words = rows(whole), ["train", *flags(settings(strategy, out="run"))]
    stop = time.monotonic() + 60 * minutes
    while tally.kills < kills and time.monotonic() < stop:
        victims = draw.choice([[0]] if processes == 1 else [[0], [1], [0, 1]])
        with fork_command(processes, words, place) as life:
            complete, seconds = live_and_die(life, draw.uniform(0, 0.6 * processes), victims)
        if complete:
            tally.completed += finished(run, whole)
            continue
        tally.kills += 1
        tally.longest_end = max(tally.longest_end, seconds)
        tally.differing += not is_start_of(run, truth)
        tally.replayed += to_compute_again(run)
    with fork_command(processes, words, place) as last:
        assert last.wait(600) == [0] * processes, last.everything_said
    tally.differing += rows(run) != truth
    tally.completed += finished(run, whole)
    return tally


def is_start_of(run: Path, truth: list[dict[str, Any]]) -> bool:
    """Whether what is written so far, but for a last line that a kill cut, is how the whole run began."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return True
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])
    written = rows(run)
    return written == truth[: len(written)]


def to_compute_again(run: Path) -> int:
    """Rows after the newest checkpoint."""
    if not (run / "metrics.jsonl").exists():
        return 0
    newest, _ = checkpoint.latest(run)
    return max(0, len(rows(run)) - 1 - (newest.state["step"] if newest else 0))


def finished(run: Path, whole: Path) -> int:
    """Compare the weights of a complete run, which then makes room for the next; 1 if they are the same."""
    assert hashes(run, STEPS) == hashes(whole, STEPS), "the weights differ"
    shutil.rmtree(run)
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--strategy", choices=["single", "ddp", "fsdp"], default="single")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train.SAMPLE_TOKENS = 1
    with tempfile.TemporaryDirectory() as place:
        os.environ["GPT2LAB_CACHE"] = str(Path(place) / "cache")
        tally = campaign(arguments.kills, arguments.minutes, arguments.strategy, Path(place), arguments.seed)
    print(tally)
    raise SystemExit(int(tally.differing > 0))


if __name__ == "__main__":
    main()
