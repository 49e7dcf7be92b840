"""A run is resumed from each of its checkpoints, for one step, which must give the next checkpoint byte for byte.

    python -m tests.campaigns.resume --steps 200 [--cells "ddp 2"]

By induction every way to stop and go on is then the run that nobody stopped. A cell is a strategy, a dropout and a number of
passes; it prints how many of its save points gave the same bytes. The suite runs a short one (tests/test_distributed.py).
"""

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt2lab import checkpoint, train
from gpt2lab.config import RunConfig
from gpt2lab.distributed import Ranks, join
from gpt2lab.recipe import load_config
from gpt2lab.run import set_up
from gpt2lab.system import StopSignals
from gpt2lab.tracking import Console, read_rows
from tests.forked import Forked
from tests.test_train import SETTINGS, flags, sentences

Cell = tuple[str, int, float, int]
"""Strategy, processes, dropout, and passes of each process in a step."""
CELLS: list[Cell] = [
    (strategy, processes, dropout, passes)
    for strategy, processes in (("single", 1), ("ddp", 2), ("fsdp", 2))
    for dropout, passes in itertools.product((0.0, 0.1), (1, 4))
]


def name_of(cell: Cell) -> str:
    return "{} {}, dropout {}, accumulation {}".format(*cell)


def settings(cell: Cell, steps: int) -> dict[str, Any]:
    """A run that writes a checkpoint after every step, and keeps them all."""
    strategy, processes, dropout, passes = cell
    return SETTINGS | {
        "steps": steps,
        "batch_tokens": 16 * processes * passes,
        "micro_batch": 1,
        "model.dropout": dropout,
        "system.strategy": strategy,
        "system.compare_every": 0,
        "validate_every": 0,
        "sample_every": 0,
        "checkpoint_every": 1,
        "checkpoint_in_background": False,
        "keep_checkpoints": steps,
        "data.source": "text.txt",
        "data.validation_tokens": 17,
        "out": "whole",
    }


def try_cell(cell: Cell, steps: int, place: Path) -> list[int]:
    """The steps whose checkpoint, resumed, did not give the next one; empty if all did."""
    (place / "text.txt").write_text(sentences())
    config = load_config([], flags(settings(cell, steps)))

    def work(rank: int) -> list[int]:
        train.SAMPLE_TOKENS = 1
        with StopSignals() as stop, join(config, stop) as ranks:
            go(config, ranks, stop, steps)
            return [step for step in range(1, steps) if not gives_the_next(config, step, ranks, stop)]

    with Forked(cell[1], work, place) as ranks:
        return list(ranks.results(timeout=3600)[0])


def go(config: RunConfig, ranks: Ranks, stop: StopSignals, until: int) -> None:
    """Set a run up, from its folder if it is there, and train to a step."""
    run = set_up(config, Console(quiet=True), ranks)
    try:
        train.loop(run, stop, until)
    finally:
        run.close()


def gives_the_next(config: RunConfig, step: int, ranks: Ranks, stop: StopSignals) -> bool:
    """Whether the run as it was after `step`, in a folder of its own, comes to the same checkpoint as the whole run."""
    whole, again = Path(config.out), Path(f"from-{step}")
    if ranks.main:
        as_it_was(whole, step, again)
    # Notes under a key can be left once: each set-up has a store of its own.
    store = dist.PrefixStore(again.name, ranks._store) if ranks._store is not None else None
    go(replace(config, out=str(again)), Ranks(ranks.device, store, ranks.watch), stop, step + 1)
    if not ranks.main:
        return True
    same = hashes(again, step + 1) == hashes(whole, step + 1)
    shutil.rmtree(again)
    return same


def as_it_was(whole: Path, step: int, again: Path) -> None:
    """A run folder as a kill right after the checkpoint of a step leaves it."""
    again.mkdir()
    for name in ("config.yaml", "run.json"):
        shutil.copy(whole / name, again)
    kept = [row for row in read_rows(whole / "metrics.jsonl") if row["step"] <= step]
    (again / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    shutil.copytree(checkpoint.step_folder(whole, step), checkpoint.step_folder(again, step), copy_function=os.link)


def hashes(run: Path, step: int) -> list[str]:
    """SHA-256 of weights and of the optimizer's state."""
    files = checkpoint.load(checkpoint.step_folder(run, step)).files
    return [files[name].sha256 for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)]


def report(cells: list[Cell], steps: int, say: Callable[[str], object] = print) -> Iterator[int]:
    """Try each cell; say, and yield, how many save points differed."""
    for cell in cells:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            os.environ["GPT2LAB_CACHE"] = str(Path(place) / "cache")
            bad = try_cell(cell, steps, Path(place))
        tried = steps - 1
        seconds = time.monotonic() - began
        say(f"{name_of(cell):45} {tried - len(bad)}/{tried} the same{f', not {bad}' * bool(bad)}  ({seconds:.0f} s)")
        yield len(bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=201, help="one more than the save points that are tried")
    parser.add_argument("--cells", default="", help='those whose name begins so: "ddp 2"')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = [cell for cell in CELLS if name_of(cell).startswith(arguments.cells)]
    raise SystemExit(int(any(list(report(cells, arguments.steps)))))


if __name__ == "__main__":
    main()
