"""The process that reads a stream: it writes one block after another, as far as it is asked to.

It is this module run by itself. It is told its job in a line of JSON, and then, a line each, up to which block it may write;
it says each block, and each file that was read to its end, as a line of JSON. It needs no torch, ends when its input does, and
hears no Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gpt2lab.data.sources import SourceFile, source_files
from gpt2lab.data.stream.blocks import write_blocks
from gpt2lab.data.stream.held_out import HeldOut
from gpt2lab.data.stream.reading import Account, Endless, Place
from gpt2lab.errors import DataError, LabError, as_lab_error
from gpt2lab.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """What a producer does, whenever it is started.

    Attributes:
        source, fields, on_fault: as in a recipe.
        files: the identities of the source's files, which must be the same now.
        held_out: the folder with the validation text.
        tokenizer: as JSON.
        length: ids in a block, its last one left out.
        workers: processes that tokenise.
    """

    source: str | Sequence[str]
    fields: Sequence[str]
    on_fault: str
    files: Sequence[Sequence[str]]
    held_out: str
    tokenizer: str
    seed: int
    length: int
    workers: int


def identities(files: Sequence[SourceFile]) -> list[list[str]]:
    """What must be the same in files for a stream to go on with them."""
    return [[file.name, file.identity] for file in files]


def refuse_other_files(now: Sequence[Sequence[str]], before: Sequence[Sequence[str]]) -> None:
    """Refuse to go on with a stream whose files are no longer those that it began with.

    Raises:
        DataError: naming the first that differs.
    """
    old, new = {pair[0]: pair[1] for pair in before}, {pair[0]: pair[1] for pair in now}
    changes = (
        [f"{name} is gone" for name in old if name not in new]
        + [f"{name} is new" for name in new if name not in old]
        + [f"{name} was {old[name]} and is {new[name]}" for name in new if name in old and old[name] != new[name]]
    )
    if changes:
        cause = f"{changes[0]}, and so it may not be the text that was learned from"
        fix = "put back what it was (on the Hub: hf:NAME@COMMIT), or start another run with another --out"
        raise DataError("the source changed", where="data.source", cause=cause, fix=fix)


def produce(job: Job, folder: Path, first: int, start: Place, wait: Any) -> Iterator[dict[str, Any]]:
    """Write blocks into a folder; yield a row for each, and one for each file that was read to its end.

    Raises:
        LabError: the source cannot be read, or is another.
    """
    files = source_files(job.source, job.fields)
    refuse_other_files(identities(files), job.files)
    tokenizer = Tokenizer.from_json(job.tokenizer)
    accounts = list[Account]()
    text = Endless(files, job.seed, HeldOut.load(Path(job.held_out)), job.on_fault, accounts.append)
    tokens = text.tokens(start, tokenizer, job.workers)
    for block in write_blocks(
        tokens, tokenizer, folder, job.length, first, lambda place: text.file_at(place).name, wait
    ):
        while accounts:
            yield accounts.pop(0).to_dict()
        yield block.to_dict()


class _Wanted:
    """How far the producer may go, as its input says; when that ends, so does the process."""

    def __init__(self, source: TextIO) -> None:
        self._source, self._number, self._changed = source, -1, threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait(self, number: int) -> None:
        """Return when a block may be written."""
        with self._changed:
            self._changed.wait_for(lambda: self._number >= number)

    def _listen(self) -> None:
        for line in self._source:
            with self._changed:
                self._number = int(line)
                self._changed.notify_all()
        os._exit(0)  # whoever wanted the blocks is gone; the half one is removed when the next begins


def serve() -> None:
    """What the process does, at its standard input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(row: dict[str, Any]) -> None:
        print(json.dumps(row, ensure_ascii=False), file=answers, flush=True)

    asked = json.loads(sys.stdin.readline())
    try:
        wanted = _Wanted(sys.stdin)
        for row in produce(
            Job(**asked["job"]), Path(asked["folder"]), asked["first"], Place(**asked["start"]), wanted.wait
        ):
            say(row)
    except BrokenPipeError:
        pass
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        bug = LabError("a bug of ours", cause=words, fix="report it")
        say({"problem": to_dict(as_lab_error(error) or bug)})


def to_dict(error: LabError) -> dict[str, str]:
    """An error as plain values."""
    kind = type(error).__name__
    return {"kind": kind, "what": error.what, "where": error.where, "cause": error.cause, "fix": error.fix}


if __name__ == "__main__":
    serve()
