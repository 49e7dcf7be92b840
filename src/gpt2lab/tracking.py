"""What a run says while it goes on: ``metrics.jsonl`` for programs, lines on the console for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from gpt2lab.paths import write_whole


class JsonLines:
    """A file of JSON rows, each with its ``step``, that can be cut back to an earlier step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; it is with the operating system when this returns, or waits until the disk has room again.

        Training does not end for a row: it is written with the next one, or with the next checkpoint. A number that is
        not finite becomes null, since JSON has none.
        """
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._waiting += json.dumps(finite, ensure_ascii=False) + "\n"
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        """What waits, whole or not at all."""
        if self._waiting:
            with self.path.open("ab", buffering=0) as file:
                end, rest = file.tell(), memoryview(self._waiting.encode())
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(end)
                    raise
            self._waiting = ""

    def sync(self) -> None:
        """Force what was added onto the disk.

        Raises:
            OSError: it does not fit.
        """
        self._write()
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())

    def cut_after(self, step: int) -> None:
        """Drop the rows after `step`, and a last row that a dying process left unfinished."""
        if not self.path.exists():
            return
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class Console:
    """Lines for a person, on stderr. Nothing here may stop a run: a closed terminal is ignored.

    On a terminal the progress line is rewritten in place; elsewhere one is printed now and then.
    """

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, every_seconds: float | None = None
    ) -> None:
        self.stream: TextIO | None = sys.stderr if stream is None else stream
        self.quiet = quiet or self.stream is None  # there is none where it was closed: 2>&-
        self._live = self.stream is not None and self.stream.isatty()
        self._every = (0.2 if self._live else 5.0) if every_seconds is None else every_seconds
        self._last = float("-inf")
        self._open_line = False

    def say(self, text: str) -> None:
        """One or more whole lines."""
        if self._open_line:
            text, self._open_line = "\n" + text, False
        self._write(text + "\n")

    def progress(self, text: str, *, final: bool = False) -> None:
        """The state now, shown at most every so often; the `final` one always."""
        if not final and time.monotonic() - self._last < self._every:
            return
        self._last = time.monotonic()
        self._write(f"\r\x1b[K{text}" if self._live else text + "\n")
        self._open_line = self._live
        if final and self._open_line:
            self.say("")

    def _write(self, text: str) -> None:
        if self.quiet or self.stream is None:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal or the pipe is gone
            self.quiet = True


def clock(seconds: float) -> str:
    """``75`` as ``1:15``."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def size(count: float) -> str:
    """``1234567`` bytes as ``1.23 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < (1000 if unit == "bytes" else 999.5):
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"
