"""Shards by the machines of a Ray cluster: Ray decides who writes which of them, and starts again what was killed.

A task is told some names of shards, reads the source by itself, and writes those shards into the folder that all share, as
``data prepare`` does on one machine. Between the processes go strings alone: what Ray packs them with is Ray's affair.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lab import errors
from gpt2lab.config import DataConfig, to_dict
from gpt2lab.data import prepare
from gpt2lab.data.shard_writer import finished_shard
from gpt2lab.data.text import Text, read_text
from gpt2lab.errors import ConfigError, DataError, LabError, ProcessError, as_lab_error
from gpt2lab.tokenizer import Tokenizer

RETRIES = 3
"""How often Ray starts a task again whose process or machine is gone."""
_STORE = 100 * 2**20  # bytes: near the least that Ray takes, for strings
_SECONDS = 1.0  # between two looks at the tasks
_CONNECT = 5.0  # seconds
_PLACE = re.compile(r"(?:ray://)?(.+):(\d+)")


def write_shards(
    config: DataConfig,
    text: Text,
    wanted: list[str],
    tokenizer: Tokenizer,
    folder: Path,
    workers: int | None,
    progress: Callable[[str], object],
) -> None:
    """What `prepare.write_shards` does, by tasks of Ray, each of which takes every n-th of the shards.

    Args:
        config: where the text comes from; every machine finds it, and the folder with the tokenizer in it, at the same path.
        workers: n; None: as many as the cluster has cores. No more than there are shards.

    Raises:
        ConfigError: Ray is missing, or cannot be reached. DataError: a task finds another text, or what `prepare.write_shards`
            raises. ProcessError: a task was killed again and again.
    """
    if "-" in (*config.sources, config.validation):
        fix = "put it into a file that every machine can read"
        raise ConfigError("not for standard input", where="--engine ray", cause="each task reads the source", fix=fix)
    with _ray() as ray:
        count = min(len(wanted), workers or int(ray.cluster_resources().get("CPU", 1)))
        told = (json.dumps(to_dict(config)), text.found.fingerprint, os.getcwd(), str(folder.absolute()))
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(write_some)
        pending = [task.remote(" ".join(wanted[number::count]), *told) for number in range(count)]
        try:
            while pending:
                done, pending = ray.wait(pending, timeout=_SECONDS)
                for problem in _results(ray, done):
                    if problem:
                        raise _unpack(problem)
                written = sum((folder / f"{name}.bin").exists() for name in wanted)
                progress(f"{written:,} of {len(wanted):,} shards written, {len(pending):,} of {count:,} tasks at work")
        finally:
            for task in pending:
                ray.cancel(task, force=True)


def write_some(names: str, config: str, fingerprint: str, place: str, folder: str) -> str:
    """The task: write these shards; those that are there were written before it was killed.

    Args:
        names: of the shards, with spaces between them.
        config: a `DataConfig`, in JSON.
        fingerprint: of the text.
        place: the folder in which the command was given.

    Returns:
        The error that ended it, in JSON; empty: there was none.
    """
    try:
        here, aside = socket.gethostname(), Path(folder)
        if not os.path.isdir(place) or not aside.is_dir():
            fix = "put --out into a folder that every machine of the cluster has, and give the command inside of one"
            raise DataError("no shared folder", where=folder, cause=f"{here} does not have it, or not {place}", fix=fix)
        os.chdir(place)
        text = read_text(DataConfig(**json.loads(config)))
        if text.found.fingerprint != fingerprint:
            cause = f"{here} finds another text than the machine of the command"
            raise DataError("texts differ", where="data.source", cause=cause, fix="copy the text to every machine")
        tokenizer = Tokenizer.load(aside)
        missing = [name for name in names.split() if finished_shard(aside / f"{name}.bin", tokenizer) is None]
        if missing:
            prepare.write_shards(text, missing, tokenizer, aside, 1, lambda words: None)
    except Exception as error:
        if (ours := as_lab_error(error)) is None:
            raise
        return _pack(ours)
    return ""


def _pack(error: LabError) -> str:
    return json.dumps([type(error).__name__, error.what, error.where, error.cause, error.fix])


def _unpack(packed: str) -> LabError:
    kind, what, where, cause, fix = json.loads(packed)
    error: LabError = getattr(errors, kind)(what, where=where, cause=cause, fix=fix)
    return error


def _results(ray: Any, done: list[Any]) -> Iterator[str]:
    """What tasks gave.

    Raises:
        ProcessError: one gave nothing, as often as it was tried.
    """
    for task in done:
        try:
            yield ray.get(task)
        except ray.exceptions.RayTaskError:  # a bug of ours
            raise
        except ray.exceptions.RayError as error:
            cause = f"Ray tried it {RETRIES + 1} times: {str(error).splitlines()[0]}"
            fix = "look at the memory of those machines; the same command goes on with the shards that are missing"
            raise ProcessError("text not tokenised", where="--engine ray", cause=cause, fix=fix) from None


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray: that of the program if it has one, else connected to ``RAY_ADDRESS``, else a cluster of this machine for us alone.

    What was not there before is not there afterwards. Nothing is reported to anybody.

    Raises:
        ConfigError: it is not installed, or there is no cluster at that address.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("no Ray", where="--engine ray", cause="it is not installed", fix="pip install 'gpt2lab[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if ray.is_initialized():
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE} if address == "local" else {}
    try:
        if (place := _PLACE.fullmatch(address)) is not None:  # Ray would ask for minutes
            socket.create_connection((place[1], int(place[2])), timeout=_CONNECT).close()
        ray.init(address, configure_logging=False, log_to_driver=False, **own)
        yield ray
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        if ray.is_initialized():  # then it is not about the cluster
            raise
        fix = "give RAY_ADDRESS=host:port of its head, or unset it for a cluster of this machine"
        raise ConfigError("no cluster of Ray", where=address, cause=str(error).splitlines()[0], fix=fix) from None
    finally:
        ray.shutdown()
