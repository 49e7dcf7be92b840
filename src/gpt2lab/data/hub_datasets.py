"""Data sets by their name on the Hugging Face Hub: which files of a repository are a configuration's split.

What the README and the names of the files say of that, the library `datasets` knows. It is shown a folder of empty files with
the repository's names: so it asks no network, runs nothing and keeps nothing, and the files are read by our own readers. A
repository whose data are made by a script is read from the Hub's own copy in Parquet.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import yaml

from gpt2lab.data.remote import RemoteFile
from gpt2lab.download import OFFLINE, patiently, words
from gpt2lab.errors import ConfigError, DataError, as_lab_error

PREFIX = "hf:"
CONVERTED = "refs/convert/parquet"
LARGEST_README = 2**23
MOST_FILES = 500_000
DEPTH = 30
"""Lists inside one another in a README's settings."""
_NAME = re.compile(
    r"hf:(?!.*\.\.)(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?"
    r"(?:/(?P<config>[^/:@]+))?(?::(?P<split>[\w.-]+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?\n)---", re.DOTALL)
_README, _SETTINGS, _INFOS = "README.md", ".huggingface.yaml", "dataset_infos.json"
_LISTED = 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # some READMEs have megabytes


@dataclass(frozen=True)
class HubFile:
    """One file of a split.

    Attributes:
        path: in its repository.
        identity: the commit and the path.
    """

    path: str
    identity: str
    remote: RemoteFile


def hub_files(source: str, sleep: Callable[[float], None] = time.sleep) -> list[HubFile]:
    """The files of ``hf:OWNER/NAME[@REVISION][/CONFIG][:SPLIT]``, in their order, at the commit that the revision is now.

    Without a configuration it is the repository's default one or its only one; without a split, train or the only one.

    Raises:
        DataError: there is no such thing, or no Hub. ConfigError: the library `datasets` is not installed.
    """
    from huggingface_hub import constants

    match = _NAME.fullmatch(source)
    if not match:
        cause = (
            f"{source!r:.200} is not hf:OWNER/NAME, with @REVISION, /CONFIG and :SPLIT after it where they are needed"
        )
        raise DataError("no name on the Hub", cause=cause, fix="such as hf:roneneldan/TinyStories:validation")
    if constants.HF_HUB_OFFLINE:
        raise DataError("cannot be had from the Hub", where=source, cause=OFFLINE[0], fix=OFFLINE[1])
    repository = _look_up(match["repository"], match["revision"] or "main", source, sleep)
    config, split = match["config"], match["split"]
    settings = repository.settings()
    if not settings and f"{PurePosixPath(repository.name).name}.py" in repository.paths:
        repository, splits = _converted(repository, config)
    else:
        splits = _resolve(repository, _choose_config(repository, settings, config))
    paths = splits[_choose_split(source, split, splits)]
    return [HubFile(path, f"{repository.name}@{repository.commit}/{path}", repository.file(path)) for path in paths]


@dataclass(frozen=True)
class _Repository:
    """A repository at one commit.

    Attributes:
        paths: of its files.
        source: as it was asked for.
    """

    name: str
    commit: str
    paths: frozenset[str]
    source: str
    sleep: Callable[[float], None]

    def file(self, path: str) -> RemoteFile:
        """One of its files."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        return RemoteFile(
            f"{constants.ENDPOINT}/datasets/{self.name}/resolve/{self.commit}/{quote(path)}",
            f"{PREFIX}{self.name}/{path}",
            headers=build_hf_headers,
            pinned=True,
            explain=words,
            sleep=self.sleep,
        )

    def settings(self) -> list[Any]:
        """What it says itself of its configurations; empty: nothing.

        Raises:
            DataError: it says it in no sense, or names what is not in it.
        """
        said: list[Any] = []
        for path, head in ((_README, _HEAD), (_SETTINGS, None)):
            if path not in self.paths:
                continue
            with self.file(path).open() as stream:
                text = stream.read(LARGEST_README).decode(errors="replace")
            found = head.match(text) if head else None
            values = self._parse(found[1] if found else "" if head else text, path)
            said = values.get("configs") or said
        if any(_leads_out(value) for value in _strings(said)):
            raise self.error("its README names files that are not in it", "use another data set, or a local copy of it")
        return said

    def error(self, cause: str, fix: str) -> DataError:
        """The error for what is wrong with it."""
        return DataError("unusable data set", where=self.source, cause=cause, fix=fix)

    def _parse(self, text: str, path: str) -> dict[str, Any]:
        try:
            depth = 0
            for event in yaml.parse(text, _LOADER):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if isinstance(event, yaml.AliasEvent) or depth > DEPTH:
                    raise ValueError("it uses YAML aliases, or lists in lists without end")
            values = _LOADER(text).get_single_data() or {}
            if not isinstance(values, dict) or not isinstance(values.get("configs") or [], list):
                raise ValueError("its settings are no list")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            cause = f"its {path} cannot be read: {error!s:.100}"
            raise self.error(cause, "use another revision, or a local copy of it") from None
        return values


def _look_up(name: str, revision: str, source: str, sleep: Callable[[float], None]) -> _Repository:
    """A repository at the commit that a revision is now, as the Hub says it.

    Raises:
        DataError: it says nothing, or that there is none.
    """
    from huggingface_hub import HfApi, constants

    def ask() -> _Repository:
        found: Any = HfApi().dataset_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if not _COMMIT.fullmatch(str(found.sha)) or not _NAME.fullmatch(f"{PREFIX}{found.id}"):
            raise ValueError(f"it calls {revision} {found.sha!r:.60}")
        paths = frozenset(str(file.rfilename) for file in found.siblings or [])
        return _Repository(found.id, found.sha, paths, source, sleep)

    def refused(cause: str, fix: str) -> DataError:
        return DataError("cannot be had from the Hub", where=source, cause=cause, fix=fix)

    return patiently(ask, 2, sleep, refused)


def _choose_config(repository: _Repository, settings: list[Any], config: str | None) -> list[Any]:
    """What a repository says of the configuration that is meant, as a list of one; without settings, it has but one.

    Raises:
        DataError: there is no such one, or it is not clear.
    """
    try:
        named = {str(one["config_name"]): one for one in settings}
        defaults = [name for name, one in named.items() if name == "default" or one.get("default")]
    except (TypeError, KeyError, AttributeError):
        raise repository.error("its README lists configurations without names", "use another data set") from None
    names = list(named) or ["default"]
    chosen = config or (defaults[0] if len(defaults) == 1 else names[0] if len(names) == 1 else "")
    if chosen not in names:
        raise _unknown(repository.source, "configuration", config, names, f"{PREFIX}{repository.name}/{names[0]}")
    return [named[chosen]] if named else []


def _resolve(repository: _Repository, settings: list[Any]) -> dict[str, list[str]]:
    """The files of each split, as the library finds them; `settings`: of one configuration, or nothing.

    Raises:
        DataError: the library finds none. ConfigError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        cause, fix = "which files a split has, the library `datasets` knows", "pip install 'gpt2lab[hub]'"
        raise ConfigError("not installed", where=repository.source, cause=cause, fix=fix) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "files").resolve()
        try:
            _draw(repository, settings, folder)
            found = datasets.load_dataset_builder(str(folder), cache_dir=str(Path(place, "cache"))).config.data_files
            return {
                str(split): [Path(path).relative_to(folder).as_posix() for path in paths]
                for split, paths in found.items()
            }
        except Exception as error:  # of many types, in the library's words for those who write data sets
            if as_lab_error(error):
                raise
            said = str(error).replace(f"{folder}/", "").replace(str(folder), repository.name)
            cause = f"the library `datasets` finds no data files in it ({said[:150]})"
            raise repository.error(cause, "look at its page on the Hub, or give a local copy of it") from None


def _draw(repository: _Repository, settings: list[Any], folder: Path) -> None:
    """Make a folder of empty files with the names of a repository's; its README has the settings alone."""
    if len(repository.paths) > MOST_FILES:
        cause = f"it has {len(repository.paths):,} files; {MOST_FILES:,} are allowed"
        raise repository.error(cause, "use another data set, or a local copy of it")
    folder.mkdir()
    empty = folder  # names of one empty file are made many times as fast as files
    for path in sorted(repository.paths - {_README, _SETTINGS, _INFOS}):
        if not _leads_out(path) and not path.endswith(".py"):
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(empty, place)
            except OSError:  # the first, or as many as the disk allows, or a disk without links
                place.touch()
                empty = place
    if settings:
        (folder / _README).write_text(f"---\n{yaml.safe_dump({'configs': settings})}---\n", encoding="utf-8")


def _converted(scripted: _Repository, config: str | None) -> tuple[_Repository, dict[str, list[str]]]:
    """The Hub's copy in Parquet of a data set that a script makes: ``CONFIG/SPLIT/0000.parquet``.

    Raises:
        DataError: it has none, or none of this configuration.
    """
    try:
        copy = _look_up(scripted.name, CONVERTED, scripted.source, scripted.sleep)
    except DataError as error:
        cause = f"a script makes it, which is not run, and its copy in Parquet cannot be had: {error.cause}"
        raise scripted.error(cause, "use a copy of it in Parquet or JSON lines, on the Hub or local") from None
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(copy.paths):
        match path.split("/"):
            case [name, split, file] if file.endswith(".parquet"):
                found.setdefault(name, {}).setdefault(split, []).append(path)
    names = sorted(found)
    config = names[0] if config is None and len(names) == 1 else config
    if config not in found:
        example = f"{PREFIX}{scripted.name}/{names[0]}" if names else "another data set"
        raise _unknown(scripted.source, "configuration", config, names, example)
    return copy, found[config]


def _choose_split(source: str, split: str | None, splits: Mapping[str, list[str]]) -> str:
    """The split that is meant; a part of one is taken only by its name.

    Raises:
        DataError: it is not there, or not clear.
    """
    only = next(iter(splits)) if len(splits) == 1 else ""
    chosen = split or ("train" if "train" in splits else "" if only.startswith("partial-") else only)
    if chosen not in splits:
        raise _unknown(
            source, "split", split, list(splits), f"{source.removesuffix(f':{split}')}:{next(iter(splits), '')}"
        )
    return chosen


def _unknown(source: str, what: str, name: str | None, known: list[str], example: str) -> DataError:
    """The error for a configuration or split that is not there, with those that are."""
    said = f"it has no {what} {name!r:.80}" if name else f"which {what} is meant is not clear"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    there = f"there are {', '.join(known[:_LISTED])}{more}" if known else "there are none"
    return DataError(f"no {what}", where=source, cause=f"{said}; {there}", fix=f"such as {example}")


def _leads_out(path: str) -> bool:
    """Whether a name or pattern is not of a file inside the repository."""
    odd = "://" in path or "::" in path or "\0" in path or "\\" in path or re.match(r"[A-Za-z]:", path)
    return bool(odd) or path.startswith(("/", "~")) or ".." in path.split("/") or len(path) > 1000


def _strings(value: Any) -> Iterator[str]:
    """All text in nested lists and maps."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
