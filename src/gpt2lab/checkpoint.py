"""A step folder that is either whole or not there: written aside, hashed, renamed, verified, and only then rotated.

    step-00000500/  model.safetensors  optimizer.safetensors  config.yaml  tokenizer.json  state.json  manifest.json

It is enough by itself: ``load_model(folder)`` needs nothing outside it. The manifest lists the size and SHA-256 of every
other file, and its own. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gpt2lab.errors import CheckpointError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.paths import whole_folder
from gpt2lab.recipe import Setting, build_model_config, parse_recipe
from gpt2lab.tensors import tensors_in
from gpt2lab.tokenizer import Tokenizer

FORMAT = 1
MODEL, OPTIMIZER, CONFIG, STATE, MANIFEST = (
    "model.safetensors", "optimizer.safetensors", "config.yaml", "state.json", "manifest.json",
)  # fmt: skip


Manifest = dict[str, dict[str, Any]]
"""Size and SHA-256 of each file, by name."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified step folder, in memory.

    Attributes:
        recipe: the settings of the run that wrote it; of an imported model, its shape alone.
        state: step, tokens and the like; empty for an imported model.
        files: what the manifest lists; a file is compared with it once more when it is read.
    """

    folder: Path
    recipe: dict[str, Setting]
    state: dict[str, Any]
    files: Manifest

    def read(self, name: str) -> bytearray:
        """The content of a file, which is what the manifest says.

        Raises:
            CheckpointError: it is not there, or has changed.
        """
        try:
            content = bytearray(self.files[name]["size"])
            with (self.folder / name).open("rb") as file:
                file.readinto(content)
            _compare(name, self.files[name], {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(self.folder, error) from None
        return content

    def load_weights(self, model: nn.Module) -> None:
        """Put the weights into `model`, strictly.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape, or not finite.
        """
        where, tensors = str(self.folder / MODEL), self._tensors(MODEL)
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if bad:
            cause = f"{', '.join(bad[:5])} have numbers that are not finite"
            raise CheckpointError("spoilt weights", where=where, cause=cause, fix="go back to an older step folder")
        assign_weights(model, tensors, where)

    def open_model(self) -> tuple[GPT2, Tokenizer]:
        """The model, in eval mode, and its tokenizer."""
        with torch.device("meta"):
            model = GPT2.from_config(build_model_config(self.recipe))
        self.load_weights(model)
        return model.eval(), Tokenizer.load(self.folder)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's state back, by the names of the parameters."""
        for name, tensor in self._tensors(OPTIMIZER).items():
            parameter, _, key = name.rpartition("/")
            target = model.get_parameter(parameter)
            optimizer.state[target][key] = tensor.to(target.device)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return dict(tensors_in(self.read(name)))
        except ValueError as error:
            cause = str(error)
            raise CheckpointError(
                "unusable weights", where=str(self.folder / name), cause=cause, fix="use another one"
            ) from None


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    folder: Path,
    model: nn.Module,
    *,
    recipe: str,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a step folder; after a crash at any point, `folder` is whole or not there.

    Args:
        model: not wrapped by compile or a strategy, so that the names in the file are the names in the code.
        recipe: YAML text that describes at least the model.
    """
    with whole_folder(folder) as aside:
        save_tensors(aside / MODEL, model.state_dict())
        if optimizer is not None:
            named = [
                (f"{name}/{key}", value)
                for name, p in model.named_parameters()
                for key, value in optimizer.state[p].items()
            ]
            # Adam's step count is a CPU scalar or a tensor, SGD may hold None before its first step.
            save_tensors(aside / OPTIMIZER, {name: value for name, value in named if isinstance(value, Tensor)})
        tokenizer.save(aside)
        (aside / CONFIG).write_text(recipe, encoding="utf-8")
        (aside / STATE).write_text(json.dumps(state or {}, indent=1))
        write_manifest(aside, step=(state or {}).get("step"), run_id=(state or {}).get("run_id"))
    verify(folder)


def write_manifest(folder: Path, **about: Any) -> None:
    """List the folder's files with their sizes and hashes, and sign the list with its own hash."""
    files = {path.name: _measure(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = {"format": FORMAT, **about, "files": files}
    (folder / MANIFEST).write_bytes(_signed(manifest))


def verify(folder: Path) -> Manifest:
    """Check every file of a step folder against its manifest, and return what that lists.

    Raises:
        CheckpointError: a file is missing, changed, or not listed, or a newer gpt2lab wrote the folder.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        del manifest["sha256"]
        if written != _signed(manifest):
            raise ValueError("the manifest does not match its own hash")
        if manifest["format"] > FORMAT:
            fix = "update gpt2lab"
            raise CheckpointError(
                "newer format", where=str(folder), cause=f"format {manifest['format']} > {FORMAT}", fix=fix
            )
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != set(manifest["files"]):
            raise ValueError(f"it lists {sorted(manifest['files'])}, but there are {sorted(present)}")
        for name, listed in manifest["files"].items():
            _compare(name, listed, _measure(folder / name))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None
    return dict(manifest["files"])


def load(folder: Path) -> Checkpoint:
    """A verified step folder.

    Raises:
        CheckpointError: it is damaged, or missing.
    """
    found = Checkpoint(folder, {}, {}, verify(folder))
    recipe = parse_recipe(found.read(CONFIG).decode(), str(folder / CONFIG))
    return replace(found, recipe=recipe, state=json.loads(found.read(STATE)))


def step_folders(run: Path) -> list[Path]:
    """The step folders of a run, newest first; whether they are whole is another question."""
    return sorted((run / "checkpoints").glob("step-[0-9]*"), reverse=True)


def latest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint with the highest step that verifies, and what was wrong with those above it."""
    troubles: list[str] = []
    for folder in step_folders(run):
        try:
            found = load(folder)
            if folder != step_folder(run, found.state.get("step", -1)):
                raise CheckpointError(
                    "misplaced checkpoint",
                    where=str(folder),
                    cause=f"it is of step {found.state.get('step')}",
                    fix="give it back its name",
                )
            return found, troubles
        except CheckpointError as error:
            troubles.append(str(error))
    return None, troubles


def rotate(run: Path, keep: int) -> None:
    """Remove the step folders that are older than the newest `keep` whole ones."""
    for folder in step_folders(run):
        if keep == 0:
            shutil.rmtree(folder)
            continue
        try:
            verify(folder)
            keep -= 1
        except CheckpointError:  # left for whoever wants to look into it
            continue


def sweep(run: Path) -> None:
    """Remove what a writer that died left half written."""
    for aside in (run / "checkpoints").glob(".step-*.part"):
        shutil.rmtree(aside, ignore_errors=True)


def assign_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Put tensors into a model under their names; every one must fit.

    Raises:
        CheckpointError: with the names that are missing, left over, or of another shape.
    """
    expected = model.state_dict()
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
    meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(tensors, assign=meta)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors writes 0600, which locks colleagues out


def _measure(path: Path) -> dict[str, Any]:
    """What a manifest says of a file; a piece at a time, since weights are large."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _compare(name: str, listed: Any, found: dict[str, Any]) -> None:
    if found != listed:
        raise ValueError(f"{name} should be {listed['size']} bytes, {listed['sha256'][:12]}..., but is {found}")


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    fix = "copy it again, or go back to an older step folder"
    return CheckpointError("damaged checkpoint", where=str(folder), cause=str(error), fix=fix)


def _signed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest, its own hash at the end."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": digest}, indent=1).encode()
