"""A run folder: whose it is, what it was started with, and whether this command may go on in it."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import uuid
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from gpt2lab.config import GPT2Config, ResolvedConfig, RunConfig, to_yaml
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.stream.producer import refuse_other_files
from gpt2lab.data.stream.text import StreamedText
from gpt2lab.distributed import Ranks
from gpt2lab.errors import CheckpointError, ConfigError
from gpt2lab.paths import write_whole
from gpt2lab.recipe import build_config, flat, read_recipe
from gpt2lab.system import choose_device, describe_machine

MAY_DIFFER = frozenset(
    [
        "out",
        "validate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "sample_every",
        "sample_prompt",
        "checkpoint_in_background",
        "checkpoint_file_bytes",
        "skip_limit",
        "on_spike",
        "micro_batch",
        "data.source",
        "data.validation",
        "data.validation_tokens",
        "system.device",
        "system.precision",
        "system.compile",
        "system.num_processes",
        "system.strategy",
        "system.shard_size",
        "system.offload",
        "system.activation_checkpointing",
        "system.exact",
        "system.timeout_seconds",
        "system.restarts",
        "system.compare_every",
    ]
)
"""Settings that may change when a run goes on: they do not decide what is learned (the text is compared by its content)."""


def check_folder(folder: Path) -> None:
    """Refuse a run folder that cannot be made or written to, before anything else is done.

    Raises:
        ConfigError: a file is in its place, or this user or disk does not allow it.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        cause = "" if there.is_dir() else f"{there} is not a folder"
        if not cause and not os.access(there, os.W_OK):
            cause = f"{there} is not writable"
    except (OSError, ValueError) as error:  # a name that no file can have
        cause = getattr(error, "strerror", None) or str(error)
    if cause:
        fix = "choose another with --out=..."
        raise ConfigError("cannot write to the folder", where=f"{folder!s:.200}", cause=cause, fix=fix)


def lock_folder(folder: Path) -> FileLock:
    """Keep other processes off a run folder; the system lifts the lock when this one ends, however it ends.

    Raises:
        ConfigError: another process is at work there.
    """
    lock, holder = FileLock(folder / ".lock", blocking=False), folder / ".holder"
    try:
        lock.acquire()
    except Timeout:
        who = holder.read_text() if holder.is_file() else "another process"
        cause = f"{who} is at work there"
        raise ConfigError(
            "run folder in use", where=str(folder), cause=cause, fix="wait for it, or use --out"
        ) from None
    holder.write_text(f"process {os.getpid()} on {platform.node()}")
    return lock


def read_stored(folder: Path) -> RunConfig | None:
    """The settings a run folder was started with, or None for a new folder."""
    path = folder / "config.yaml"
    return build_config(read_recipe(path)) if path.is_file() else None


def inherit(config: RunConfig, stored: RunConfig) -> RunConfig:
    """What a command leaves open stays as it was when the run started, also where this machine would choose otherwise."""

    def fill(given: Any, before: Any) -> Any:
        names = [field.name for field in fields(given) if field.name not in ("num_processes", "strategy", "shard_size")]
        open_ = {name: getattr(before, name) for name in names if getattr(given, name) in (None, "auto")}
        return replace(given, **open_)

    if config.model == GPT2Config() and stored.init_from is not None:  # the shape was taken from there
        config = replace(config, model=stored.model)
    sections = {
        name: fill(getattr(config, name), getattr(stored, name)) for name in ("model", "data", "optim", "system")
    }
    given = replace(config, **sections)
    return replace(given, steps=config.steps or (None if config.epochs else stored.steps), **{
        name: getattr(stored, name)
        for name in ("micro_batch", "seq_len", "init_from", "tokenizer")
        if getattr(config, name) is None
    })  # fmt: skip


def refuse_differences(
    config: RunConfig, stored: RunConfig, folder: Path, *, except_for: frozenset[str] = frozenset()
) -> None:
    """Refuse to go on with other settings than the folder's, listing them.

    Raises:
        CheckpointError: at least one differs that decides what is learned.
    """
    now, before = flat(config), flat(stored)
    deciding = before.keys() - MAY_DIFFER - except_for
    differing = [
        f"{key} {before[key]!r} is now {now[key]!r}" for key in before if key in deciding and now[key] != before[key]
    ]
    if differing:
        fix = "give the settings it was started with, or another folder with --out=..."
        raise CheckpointError(
            "the run folder is of another configuration", where=str(folder), cause="; ".join(differing), fix=fix
        )


def refuse_other_text(folder: Path, data: Prepared | StreamedText) -> None:
    """Refuse to go on with another text than the run began with.

    Raises:
        CheckpointError: its tokens are others. DataError: the files of a stream are.
    """
    about = read_about(folder)
    if isinstance(data, StreamedText):
        refuse_other_files(data.files, about.get("files", []))
    if about.get("data") != data.fingerprint:
        cause = "the text or its tokenizer is not the one this run learned from"
        raise CheckpointError("other text", where=str(folder), cause=cause, fix="give the same text, or another --out")


def open_folder(folder: Path, config: ResolvedConfig, data: Prepared | StreamedText) -> str:
    """Make the run folder, or find it again; return the run's id."""
    folder.mkdir(parents=True, exist_ok=True)
    about = read_about(folder)
    if not about or not (folder / "config.yaml").is_file():
        about = {
            "run_id": uuid.uuid4().hex,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv[1:],
            "machine": describe_machine(choose_device(config.system.device)),
            "data": data.fingerprint,
        }
        about |= {"files": data.files} if isinstance(data, StreamedText) else {}
        write_whole(folder / "run.json", json.dumps(about, indent=1))
        write_whole(folder / "config.yaml", portable_recipe(config))
    return str(about["run_id"])


def note_sitting(folder: Path, step: int, config: ResolvedConfig, ranks: Ranks) -> None:
    """Write down what the steps after `step` are computed on: whoever wants the same bits again needs the same."""
    about = read_about(folder)
    sittings = [sitting for sitting in about.get("sittings", []) if sitting["after_step"] < step]
    about["sittings"] = [*sittings, {
        "after_step": step, "processes": ranks.world_size, "strategy": config.system.strategy, "exact": config.system.exact,
        "micro_batch": config.micro_batch, "device": ranks.device.type, "precision": config.system.precision,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }]  # fmt: skip
    write_whole(folder / "run.json", json.dumps(about, indent=1))


def read_about(folder: Path) -> dict[str, Any]:
    """When, how and on what a run was started; empty where none was."""
    path = folder / "run.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def portable_recipe(config: ResolvedConfig) -> str:
    """The settings of a run, without the place where its folder happens to lie."""
    return to_yaml(replace(config, out=Path(config.out).name))
