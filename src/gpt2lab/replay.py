"""A logged step again, to the same bits: from the checkpoint before it, or else from the start of the run."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2lab import checkpoint
from gpt2lab.config import RunConfig
from gpt2lab.distributed import join
from gpt2lab.errors import CheckpointError, ConfigError, Interrupted
from gpt2lab.feed import JOURNAL, await_text, remove_blocks
from gpt2lab.folder import read_about, read_stored
from gpt2lab.health import describe_batch
from gpt2lab.run import set_up
from gpt2lab.system import StopSignals
from gpt2lab.tracking import Console, read_rows
from gpt2lab.train import train_step

MEASURED = frozenset(["tokens_per_second", "elapsed_seconds", "peak_memory_bytes", "val_loss", "val_perplexity"])
"""What a row has that is no function of the step, or belongs to a validation after it."""


@dataclass(frozen=True)
class Replayed:
    """A step that was computed again.

    Attributes:
        after_step: of the checkpoint it started from; 0: from the first weights.
        logged, replayed: its row, then and now.
        batch: what it learned from: where each sample starts, and text.
    """

    step: int
    after_step: int
    logged: dict[str, Any]
    replayed: dict[str, Any]
    batch: dict[str, Any]

    @property
    def same(self) -> bool:
        """Whether every number is the same to the bit."""
        return self.logged == self.replayed


def settings_of(folder: Path, step: int) -> RunConfig:
    """The settings that a logged step was computed with: the run's, on as many processes as then.

    Raises:
        CheckpointError: there is no run. ConfigError: the step is not in its log.
    """
    stored, log = read_stored(folder), folder / "metrics.jsonl"
    if stored is None or not log.exists():
        cause = "config.yaml or metrics.jsonl is not there"
        raise CheckpointError("no run", where=str(folder), cause=cause, fix="give the folder of a run")
    logged = [row["step"] for row in read_rows(log) if row["step"]]
    if step not in logged:
        there = f"steps {logged[0]} to {logged[-1]} are" if logged else "none is"
        raise ConfigError("no such step", where=f"--step={step}", cause=f"{there} in {log}", fix="give one of them")
    # The sitting that computed it: each began after the steps of the one before.
    sitting = [sitting for sitting in read_about(folder)["sittings"] if sitting["after_step"] < step][-1]
    system = replace(
        stored.system, num_processes=sitting["processes"],
        **{key: sitting[key] for key in ("strategy", "exact", "device", "precision")},
    )  # fmt: skip
    return replace(stored, micro_batch=sitting["micro_batch"], system=system)


def replay(folder: Path, step: int, config: RunConfig, console: Console) -> Replayed:
    """Compute a logged step again, in memory; the run folder is only read.

    Args:
        config: what `settings_of` gave.

    Raises:
        LabError: as in training.
    """
    logged = {row["step"]: row for row in read_rows(folder / "metrics.jsonl")}
    sitting = [sitting for sitting in read_about(folder)["sittings"] if sitting["after_step"] < step][-1]
    with StopSignals() as stop, join(config, stop) as ranks, tempfile.TemporaryDirectory() as place:
        torch.set_num_threads(sitting["threads"])
        copy = Path(place) / folder.name
        if ranks.main:
            _copy_before(folder, step, copy)
        run = set_up(replace(config, out=str(copy)), Console(quiet=True), ranks)
        after, row = run.step, {}
        while run.step < step:
            run.step += 1
            run.shift = logged[run.step].get("shift", run.shift)
            if not await_text(run.batches, run.step - 1 + run.shift, ranks, stop):
                raise Interrupted("stopped", where=str(folder), cause="nothing was changed", fix="give it again")
            row = train_step(run)
            run.health.note(row)
            if ranks.main:
                console.progress(f"replaying step {run.step} of {step}", final=run.step == step)
        batch = describe_batch(run.batches, run.tokenizer, step - 1 + run.shift, [], {})
        remove_blocks(run.batches.samples)
        run.close()
    then, now = ({key: value for key, value in r.items() if key not in MEASURED} for r in (logged[step], row))
    return Replayed(step, after, then, now, batch)


def _copy_before(folder: Path, step: int, copy: Path) -> None:
    """A run folder with the newest whole checkpoint before `step`, and nothing later."""
    copy.mkdir()
    for name in ("config.yaml", "run.json", JOURNAL):
        if (folder / name).exists():
            shutil.copy(folder / name, copy)
    for found in checkpoint.step_folders(folder):
        if int(found.name.partition("-")[2]) < step:
            try:
                checkpoint.load(found)
            except CheckpointError:
                continue
            shutil.copytree(found, copy / "checkpoints" / found.name)
            return
