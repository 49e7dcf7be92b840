"""A step folder that is either whole or not there: written aside, hashed, renamed, verified, and only then rotated.

    step-00000500/  model.safetensors  optimizer.safetensors  config.yaml  tokenizer.json  state.json  manifest.json

It is enough by itself: ``load_model(folder)`` needs nothing outside it. Where the tensors are many, there are
``model-00001-of-00003.safetensors`` and so on. The files are the same from every strategy. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2lab import manifest
from gpt2lab.errors import CheckpointError, ResourceError, as_lab_error
from gpt2lab.manifest import FORMAT, FileRecord, Manifest, Seen, damaged, verify
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.reading import assemble, quantize_weights
from gpt2lab.paths import whole_folder
from gpt2lab.recipe import Setting, build_model_config, parse_recipe
from gpt2lab.tensors import save_tensors, tensors_in
from gpt2lab.tokenizer import Tokenizer

MODEL, OPTIMIZER, CONFIG, STATE = "model.safetensors", "optimizer.safetensors", "config.yaml", "state.json"
QUANTIZE = "quantize"
"""The key in a folder's config that says what its weights were quantised to; such a folder is for reading alone."""
FILE_BYTES = 5_000_000_000
"""Tensors beyond so many bytes go into a second file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified step folder.

    Attributes:
        recipe: the settings of the run that wrote it; of an imported model, its shape alone.
        state: step, tokens and the like; empty for an imported model.
        files: what the manifest lists; a file is compared with it once more when it is read.
    """

    folder: Path
    recipe: dict[str, Setting]
    state: dict[str, Any]
    files: dict[str, FileRecord]

    def read(self, name: str) -> bytearray:
        """The content of a file, which is what the manifest says.

        Raises:
            CheckpointError: it is not there, or has changed.
        """
        try:
            listed = self.files[name]
            content = bytearray(listed.size)
            with (self.folder / name).open("rb") as file:
                file.readinto(content)
            manifest.compare(name, listed, FileRecord(len(content), hashlib.sha256(content).hexdigest()))
        except (OSError, ValueError, KeyError) as error:
            raise damaged(self.folder, error) from None
        return content

    def weights(self) -> dict[str, Tensor]:
        """The weights by their names in the code, from however many files.

        Raises:
            CheckpointError: a file has changed, or a number is not finite.
        """
        tensors = self._tensors(MODEL)
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if bad:
            cause = f"{', '.join(bad[:5])} have numbers that are not finite"
            fix = "go back to an older step folder"
            raise CheckpointError("spoilt weights", where=str(self.folder), cause=cause, fix=fix)
        return tensors

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state, named as by `optimizer_tensors`; empty where none was saved."""
        return self._tensors(OPTIMIZER)

    def load_weights(self, model: nn.Module) -> None:
        """Put the weights into `model`, strictly.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape, or not finite.
        """
        assign_weights(model, self.weights(), str(self.folder))

    def open_model(self) -> tuple[GPT2, Tokenizer]:
        """The model, in eval mode, and its tokenizer; a quantised one is ready to read."""
        with torch.device("meta"):
            model = GPT2.from_config(build_model_config(self.recipe))
        if QUANTIZE in self.recipe:
            weights = self.weights()
            check_weights(quantize_weights(model.state_dict(), self.recipe[QUANTIZE].value), weights, str(self.folder))
            return assemble(model, weights), Tokenizer.load(self.folder)
        self.load_weights(model)
        return model.eval(), Tokenizer.load(self.folder)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's state back, by the names of the parameters."""
        for name, tensor in self.optimizer().items():
            parameter, _, key = name.rpartition("/")
            target = model.get_parameter(parameter)
            optimizer.state[target][key] = tensor.to(target.device)

    def _tensors(self, file: str) -> dict[str, Tensor]:
        """The tensors of a file, or of the files it was cut into."""
        stem = file.removesuffix(".safetensors")
        names = sorted(name for name in self.files if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors", name))
        if names and names != part_names(file, len(names)):
            raise damaged(self.folder, ValueError(f"{', '.join(names)} are not all the files of the {stem}"))
        try:
            return {key: tensor for name in names for key, tensor in tensors_in(self.read(name)).items()}
        except CheckpointError:
            raise
        except ValueError as error:
            where = str(self.folder / file)
            raise CheckpointError("unusable weights", where=where, cause=str(error), fix="use another one") from None


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    recipe: str,
    tokenizer: Tokenizer,
    optimizer: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
    seen: Seen | None = None,
) -> Manifest:
    """Write a step folder and verify it; after a crash at any point, `folder` is whole or not there.

    Args:
        weights: whole tensors by their names in the code, as ``model.state_dict()`` gives them.
        recipe: YAML text that describes at least the model.
        optimizer: see `optimizer_tensors`.
        file_bytes: tensors beyond so many bytes go into a second file, and so on.
        seen: see `manifest.verify`.

    Raises:
        ResourceError: the disk is full; nothing of it is left. CheckpointError: the disk gives back something else.
    """
    state = dict(state or {})
    tensors = cut(MODEL, weights, file_bytes) | (cut(OPTIMIZER, optimizer, file_bytes) if optimizer is not None else {})
    try:
        with whole_folder(folder) as aside:
            known = {name: save_tensors(aside / name, part) for name, part in tensors.items()}
            tokenizer.save(aside)
            (aside / CONFIG).write_text(recipe, encoding="utf-8")
            (aside / STATE).write_text(json.dumps(state, indent=1))
            manifest.write(aside, known, step=state.get("step"), run_id=state.get("run_id"))
            if folder.exists():
                discard(folder)
    except OSError as error:
        full = as_lab_error(error)
        if not isinstance(full, ResourceError):
            raise
        needed = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
        cause = f"{full.cause}: {needed:,} bytes are needed, {shutil.disk_usage(folder.parent).free:,} are free"
        raise ResourceError(full.what, where=str(folder), cause=cause, fix=full.fix) from None
    return verify(folder, {} if seen is None else seen)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``parameter/key``: ``layers.0.mlp.up_proj.weight/exp_avg``."""
    states = [(name, optimizer.state[parameter]) for name, parameter in model.named_parameters()]
    # Adam's step count is a tensor too; SGD may hold None before its first step.
    return {f"{name}/{key}": value for name, kept in states for key, value in kept.items() if isinstance(value, Tensor)}


def cut(file: str, tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, dict[str, Tensor]]:
    """What goes into each file: whole tensors in the order of their names, up to `file_bytes` or a single larger one."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        if parts[-1] and size + tensors[name].nbytes > file_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensors[name]
        size += tensors[name].nbytes
    return dict(zip(part_names(file, len(parts)), parts, strict=True))


def part_names(file: str, count: int) -> list[str]:
    """``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on."""
    stem = file.removesuffix(".safetensors")
    return [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] if count > 1 else [file]


def load(folder: Path, seen: Seen | None = None) -> Checkpoint:
    """A verified step folder; one in an older format is read as if it were in the newest.

    Args:
        seen: see `manifest.verify`.

    Raises:
        CheckpointError: it is damaged, or missing.
    """
    found = verify(folder, seen)
    checkpoint = Checkpoint(folder, {}, {}, found.files)
    recipe = parse_recipe(checkpoint.read(CONFIG).decode(), str(folder / CONFIG))
    state = json.loads(checkpoint.read(STATE))
    for version in range(found.format, FORMAT):
        state = MIGRATIONS[version](state)
    return Checkpoint(folder, recipe, state, found.files)


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    """Format 2 says how well the model did on held-out text, what ran it, and which text was left out."""
    added: dict[str, Any] = {"val_loss": None, "processes": 1, "strategy": "single", "skipped": [], "shift": 0}
    return added | state if state else {}


MIGRATIONS = {1: _from_1}
"""From each format, what brings the state to the next."""


def step_folders(run: Path) -> list[Path]:
    """The step folders of a run, newest first; whether they are whole is another question."""
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in (run / "checkpoints").glob("step-*")]
    return [path for _, path in sorted(((int(name[1]), path) for name, path in named if name), reverse=True)]


def load_step(folder: Path, seen: Seen | None = None) -> Checkpoint:
    """The checkpoint in a step folder of a run.

    Raises:
        CheckpointError: it is damaged, or of another step than its name says.
    """
    found = load(folder, seen)
    step = found.state.get("step", -1)
    if folder.name != step_folder(folder, step).name:
        raise CheckpointError(
            "misplaced checkpoint", where=str(folder), cause=f"it is of step {step}", fix="give it back its name"
        )
    return found


def latest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint with the highest step that verifies, and what was wrong with those above it."""
    troubles: list[str] = []
    for folder in step_folders(run):
        try:
            return load_step(folder), troubles
        except CheckpointError as error:
            troubles.append(str(error))
    return None, troubles


def rotate(run: Path, keep: int, seen: Seen | None = None) -> None:
    """Remove whole step folders, but not the newest `keep`, the best, and those that are pinned.

    The best has the lowest validation loss. ``step-00000500.keep`` beside ``step-00000500`` pins that. Damaged folders are
    left for whoever wants to look into them.

    Args:
        seen: see `manifest.verify`.
    """
    whole: list[Checkpoint] = []
    for folder in step_folders(run):
        try:
            whole.append(load_step(folder, seen))
        except CheckpointError:
            continue
    kept = {found.folder for found in [*whole[:keep], *best(whole)]}
    for folder in (found.folder for found in whole):
        if folder not in kept and not folder.with_name(f"{folder.name}.keep").exists():
            discard(folder)
    sweep(run)


def best(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The one with the lowest validation loss; none where none was validated."""
    losses = [(found.state.get("val_loss"), found) for found in checkpoints]
    known = [(loss, found) for loss, found in losses if loss is not None and math.isfinite(loss)]
    return [min(known, key=lambda pair: pair[0])[1]] if known else []


def discard(folder: Path) -> None:
    """Remove a step folder; after a crash at any point it is there whole, or no longer there under its name."""
    aside = folder.with_name(f".{folder.name}.old.part")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what a writer that died left half written, or half removed."""
    for aside in (run / "checkpoints").glob(".step-*.part"):
        shutil.rmtree(aside, ignore_errors=True)


def assign_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Put tensors into a model under their names; every one must fit.

    Raises:
        CheckpointError: with the names that are missing, left over, or of another shape.
    """
    check_weights(model.state_dict(), tensors, where)
    meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(tensors, assign=meta)


def check_weights(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors whose names or shapes are not those expected.

    Raises:
        CheckpointError: with the names that are missing, left over, or of another shape.
    """
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"left over {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            "weights do not fit the model", where=where, cause=shown, fix="give the config they belong to"
        )
