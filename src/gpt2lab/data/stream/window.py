"""The blocks of a stream that are on this disk: a few, and always those that a step needs.

One process of each machine has them brought by a producer; the others find them. Whoever is asked for a block that is not
there says so, and what was wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2lab import errors
from gpt2lab.data.shards import Shards
from gpt2lab.data.stream.blocks import Block, Journal, block_path
from gpt2lab.data.stream.producer import Job, to_dict
from gpt2lab.data.stream.reading import Place
from gpt2lab.errors import DataError, LabError, ProcessError
from gpt2lab.paths import write_whole

AHEAD, BEHIND = 1, 2
"""Blocks that are made before they are needed, and kept after: another process may be a step behind, which is no longer
than a block."""
ATTEMPTS = 3
"""Producers that may die one after the other without a block."""
_PROBLEM = "problem.json"
_SECONDS_TO_END = 5


class Window:
    """The blocks in a folder, as seen by a process that reads them.

    Attributes:
        newest: of those that all processes know to be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.newest = folder, -1
        self._open: dict[int, Shards] = {}

    def block(self, number: int) -> Shards:
        """The ids of a block.

        Raises:
            DataError: it is not there, or is damaged.
        """
        if number not in self._open:
            self._open = {n: shards for n, shards in self._open.items() if n >= number - BEHIND}
            self._open[number] = Shards([block_path(self.folder, number)])
        return self._open[number]

    def has(self, number: int) -> bool:
        """Whether a block is there, and with it all before it that are still needed.

        Raises:
            LabError: it will never be.
        """
        if self._is_here(number):
            return True
        with suppress(FileNotFoundError):
            raise from_dict(json.loads((self.folder / _PROBLEM).read_text()))
        return False

    def _is_here(self, number: int) -> bool:
        return block_path(self.folder, number).exists()

    def where(self, number: int) -> str:
        """The place of a block in its source, for a person; empty where this process does not know."""
        return ""

    def news(self) -> list[str]:
        """What a person should be told of, and was not yet."""
        return []

    def close(self) -> None:
        """Nothing more is needed."""


class Bringer(Window):
    """The same, in the one process of a machine that has the blocks brought.

    Args:
        journal: of the blocks so far; those that come are added.
    """

    def __init__(self, folder: Path, job: Job, journal: Journal) -> None:
        super().__init__(folder)
        self.journal, self._notes = journal, deque[str]()
        self._job, self._deaths, self._wanted, self._needed = job, 0, -1, 0
        self._seen = set[int]()  # blocks that are there, and are what they were if they were there before
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _PROBLEM).unlink(missing_ok=True)

    def has(self, number: int) -> bool:
        """Whether a block is there; if not, it is on its way."""
        if not (self.folder / _PROBLEM).exists():
            self._keep_going(number)
        return super().has(number)

    def _is_here(self, number: int) -> bool:
        return number in self._seen

    def _keep_going(self, number: int) -> None:
        """Have the blocks brought up to that one and some after it."""
        self._needed = max(self._needed, number)
        if self._process is None:
            self._start(number)
        elif self._listener and not self._listener.is_alive():
            self._start_again(number)
        if number + AHEAD > self._wanted:
            self._wanted = number + AHEAD
            self._ask()
            self._remove_old()

    def where(self, number: int) -> str:
        """The file that a block begins in."""
        block, files = self.journal.blocks.get(number), len(self._job.files)
        if block is None:
            return ""
        epoch = f", epoch {block.place.epoch + 1}" if block.place.epoch else ""
        return f"in {block.file} ({block.place.file + 1} of {files}{epoch})"

    def news(self) -> list[str]:
        """What was left out of the files that were read."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def close(self) -> None:
        """End the producer."""
        self._end()

    def _end(self) -> int:
        """Clear away a producer, if there is one; the code with which it ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin and process.stdout and self._listener
        with suppress(BrokenPipeError):  # of what was not sent any more
            process.stdin.close()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
        self._listener.join()
        process.stdout.close()
        return process.wait()

    def _start(self, number: int) -> None:
        """Start a producer at the first block, from that one on, that is not there as it was."""
        while self._is_as_it_was(number):
            self._seen.add(number)
            number += 1
        kept = {block_path(self.folder, n) for n in range(number - BEHIND - AHEAD - 1, number)}
        for path in set(self.folder.glob("block-*")) - kept:
            path.unlink()
        before = self.journal.before(number)
        first, start = (before.number + 1, before.next) if before else (0, Place())
        asked = {"job": asdict(self._job), "folder": str(self.folder), "first": first, "start": asdict(start)}
        # With our own path, and no file of the working folder in front; away from the keys of our terminal.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gpt2lab.data.stream.producer"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, args=[self._process], daemon=True)
        self._listener.start()
        self._send(json.dumps(asked))
        self._ask()

    def _start_again(self, number: int) -> None:
        """After a producer has died."""
        code, self._deaths = self._end(), self._deaths + 1
        if self._deaths < ATTEMPTS:
            self._start(number)
            return
        how = f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"
        cause = f"the process that reads it {how}, {ATTEMPTS} times in a row"
        fix = "if memory is short, free some; then give the same command again"
        self._fail(ProcessError("text not read", where="data.source", cause=cause, fix=fix))

    def _ask(self) -> None:
        """Let the producer go on."""
        if self._wanted >= 0:
            self._send(str(self._wanted))

    def _send(self, line: str) -> None:
        with suppress(BrokenPipeError):  # the listener notices
            assert self._process and self._process.stdin
            print(line, file=self._process.stdin, flush=True)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Take what the producer says until it ends; in a thread."""
        assert process.stdout
        for line in process.stdout:
            row = json.loads(line)
            if "problem" in row:
                self._fail(from_dict(row["problem"]))
            elif "sha256" in row:
                self._note_block(Block.from_dict(row))
            else:
                self.journal.add(row)
                self._note_faults(row)

    def _note_block(self, block: Block) -> None:
        known = self.journal.blocks.get(block.number)
        if known is not None and known != block:
            cause = f"block {block.number}, from {block.file} on, is not what was learned from"
            fix = "put back what the source was, or start another run with another --out"
            self._fail(DataError("the source changed", where="data.source", cause=cause, fix=fix))
            return
        self.journal.add(block.to_dict())
        self._seen.add(block.number)
        self._deaths = 0
        self._remove_old()

    def _note_faults(self, account: dict[str, Any]) -> None:
        """Tell of what is wrong in a file, the first time that it is read."""
        for row in account["skipped"]:
            if row["fault"] and not account["epoch"]:
                place = f", first {row['where']}" if row["where"] else ""
                size = sum(account["skipped_by_reason"].values())
                self._notes.append(f"left out {size:,} bytes of {account['file']}: {row['reason']}{place}")
                return

    def _remove_old(self) -> None:
        for path in self.folder.glob("block-*.bin"):
            if int(path.stem.partition("-")[2]) < self._needed - BEHIND:
                path.unlink(missing_ok=True)

    def _is_as_it_was(self, number: int) -> bool:
        """Whether a block is on the disk as the journal says."""
        known = self.journal.blocks.get(number)
        try:
            return known is not None and Shards([block_path(self.folder, number)]).headers[0].sha256 == known.sha256
        except DataError:
            return False

    def _fail(self, error: LabError) -> None:
        """Let all processes of this machine know."""
        write_whole(self.folder / _PROBLEM, json.dumps(to_dict(error)))


def from_dict(values: dict[str, str]) -> LabError:
    """The error that `to_dict` made plain values of."""
    kind: type[LabError] = getattr(errors, values["kind"])
    return kind(values["what"], where=values["where"], cause=values["cause"], fix=values["fix"])
