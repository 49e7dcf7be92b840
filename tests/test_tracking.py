"""metrics.jsonl survives whatever happens to its writer, and the console never stops a run."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.tracking import Console, JsonLines, clock, read_rows, size
from tests.test_checkpoint import DIED, DONE, at_each_operation, die, in_a_child

ROWS = [{"step": step, "loss": 1 / (step + 1), "text": f"é {step}\n\u2028\x85"} for step in range(5)]


@pytest.fixture
def log(tmp_path: Path) -> JsonLines:
    log = JsonLines(tmp_path / "metrics.jsonl")
    for row in ROWS:
        log.append(row)
    return log


# --- JsonLines --------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_one_a_line(log: JsonLines) -> None:
    log.sync()
    assert list(read_rows(log.path)) == ROWS
    assert log.path.read_bytes().count(b"\n") == len(ROWS)


@pytest.mark.parametrize("step", [-1, 0, 3, 4, 99])
@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', "{", '{"step": 5}'], ids=len)
def test_it_is_cut_back_to_a_step(step: int, torn: str, log: JsonLines) -> None:
    """Also where a dying process left half a row, or all of one but its line end."""
    with log.path.open("a") as file:
        file.write(torn)
    log.cut_after(step)
    assert list(read_rows(log.path)) == ROWS[: step + 1]
    log.append({"step": 7})
    assert list(read_rows(log.path)) == [*ROWS[: step + 1], {"step": 7}]
    assert os.listdir(log.path.parent) == ["metrics.jsonl"]


def test_what_is_not_there_is_left_alone(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.cut_after(3)
    log.sync()
    assert not list(tmp_path.iterdir())


def test_cutting_may_die_at_any_operation(log: JsonLines) -> None:
    before, codes = shutil.copy(log.path, log.path.parent / "before"), []
    for code in at_each_operation(lambda: log.cut_after(2), die):
        codes.append(code)
        assert list(read_rows(log.path)) in (ROWS, ROWS[:3])
        log.cut_after(2)
        assert list(read_rows(log.path)) == ROWS[:3]
        shutil.copy(before, log.path)
    assert codes[-1] == DONE and set(codes[:-1]) == {DIED} and len(codes) > 3


# --- Console ----------------------------------------------------------------------------------------------------------


class Stream:
    """A stream that notes what it is given, and from some point on is gone."""

    def __init__(self, *, live: bool = False, writes: int = 10**9, error: Exception | None = None) -> None:
        self.text, self.live, self.writes, self.error = "", live, writes, error

    def write(self, text: str) -> None:
        self.writes -= 1
        if self.writes < 0 and self.error is not None:
            raise self.error
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return self.live


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "the terminal is gone"), ValueError("closed file")])
def test_a_stream_that_is_gone_stops_nothing(error: Exception) -> None:
    stream = Stream(writes=1, error=error)
    console = Console(stream, every_seconds=0)
    console.say("one")
    console.say("two")
    console.progress("three", final=True)
    assert stream.text == "one\n"


def test_no_stream_at_all_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    Console().say("one")


def test_progress_is_shown_now_and_then_and_at_the_end() -> None:
    seldom, always = Stream(), Stream()
    for stream, every in ((seldom, 1e9), (always, 0)):
        console = Console(stream, every_seconds=every)
        for step in range(5):
            console.progress(f"step {step}", final=step == 4)
    assert seldom.text.split("\n") == ["step 0", "step 4", ""]
    assert always.text.split("\n") == [f"step {step}" for step in range(5)] + [""]


def test_on_a_terminal_the_line_is_rewritten_and_what_is_said_stays() -> None:
    stream = Stream(live=True)
    console = Console(stream, every_seconds=0)
    console.progress("step 1")
    console.progress("step 2")
    console.say("val 3")
    console.progress("step 3", final=True)
    console.say("done")
    screen = [line.rpartition("\x1b[K")[2].rpartition("\r")[2] for line in stream.text.split("\n")]
    assert [line for line in screen if line] == ["step 2", "val 3", "step 3", "done"]


def test_quiet_is_quiet() -> None:
    stream = Stream()
    console = Console(stream, quiet=True, every_seconds=0)
    console.say("one")
    console.progress("two", final=True)
    assert stream.text == ""


# --- Numbers for people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (75, "1:15"), (59.6, "1:00"), (3600, "1:00:00"), (360_061, "100:01:01"), (-5, "0:00")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@given(seconds=st.floats(-1e9, 1e9))
def test_a_clock_is_never_negative_and_reads_back(seconds: float) -> None:
    parts = [int(part) for part in clock(seconds).split(":")]
    assert all(part >= 0 for part in parts) and all(part < 60 for part in parts[1:])
    assert sum(part * 60**place for place, part in enumerate(reversed(parts))) == max(0, round(seconds))


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (1234567, "1.23 MB"), (5e10, "50 GB"), (2e15, "2e+03 TB")]
)
def test_size(count: float, shown: str) -> None:
    assert size(count) == shown


def test_rows_are_plain_json(log: JsonLines) -> None:
    assert [json.loads(line) for line in log.path.read_bytes().split(b"\n")[:-1]] == ROWS


def test_a_full_disk_keeps_rows_until_there_is_room(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 60 bytes, until they may."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = JsonLines(tmp_path / "rows.jsonl")
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))
        for step in range(10):
            log.append({"step": step, "loss": 1.5})
        assert [row["step"] for row in read_rows(log.path)] == [0, 1]  # 26 bytes each, and no half of a third
        with pytest.raises(OSError, match="too large"):
            log.sync()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.append({"step": 10, "loss": 1.5})
        assert [row["step"] for row in read_rows(log.path)] == list(range(11))
        os._exit(DONE)

    assert in_a_child(work) == DONE
