"""The rows of a study: one recipe, and what each row changes; every row is trained in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpt2lab.config import RunConfig, to_yaml
from gpt2lab.errors import Interrupted, ProcessError
from gpt2lab.recipe import Setting, build_config, parse_recipe
from gpt2lab.system import StopSignals
from gpt2lab.tracking import Console


@dataclass(frozen=True)
class Row:
    """One run of a study.

    Attributes:
        name: as it stands in the table.
        changes: the dotted keys in which it differs from the row above it.
        config: all of its settings; ``config.out`` is its folder.
    """

    name: str
    changes: dict[str, Any]
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)


def read_rows(text: str, out: Path) -> list[Row]:
    """The rows that a study file describes, each with what stands above it, under the folder `out`."""
    study = yaml.safe_load(text)
    settings = parse_recipe(yaml.safe_dump(study["recipe"]), "recipe")
    rows = []
    for name, changes in study["rows"].items():
        settings = settings | {key: Setting(value, f"{name}: {key}") for key, value in changes.items()}
        folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        placed = settings | {"out": Setting(str(out / folder), "out")}
        rows.append(Row(name, changes, build_config(placed)))
    return rows


def train_row(row: Row, console: Console) -> None:
    """Train a row in a fresh process, or go on with it; do nothing where it is complete.

    A process of its own makes its peak memory its own, and ``recipe.yaml`` in the folder above lets anyone repeat it.

    Raises:
        Interrupted: a signal came, and the row has saved its checkpoint. ProcessError: the row ended with an error.
    """
    recipe = row.folder.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(f"# gpt2lab train {recipe.as_posix()}\n{to_yaml(row.config)}", encoding="utf-8")
    command = [sys.executable, "-m", "gpt2lab", "train", str(recipe)]
    with StopSignals() as stop:
        # In a session of its own, so that Ctrl-C reaches it once, through us: a second signal would end it unsaved.
        child = subprocess.Popen(command, start_new_session=True)
        told = False
        while child.poll() is None:
            if stop.received and not told:
                child.send_signal(signal.SIGTERM)
                told = True
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.2)
    if child.returncode == Interrupted.exit_code or (stop.received and child.returncode <= 0):
        cause = f"{row.name} has saved its checkpoint"
        raise Interrupted(
            "study stopped", where=str(row.folder), cause=cause, fix="give the same command again to go on"
        )
    if child.returncode:
        raise ProcessError(
            "a row of the study failed",
            where=row.name,
            cause=f"`gpt2lab train {recipe}` ended with exit code {child.returncode}; its own line stands above",
            fix="mend what that line names; the rows that are complete will be skipped",
        )
