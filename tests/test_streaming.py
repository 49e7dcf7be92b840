"""Training from a stream: the same samples to the id, whoever is killed and however many go on; what breaks loses nothing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gpt2lab import checkpoint
from gpt2lab.data.batches import Batches
from gpt2lab.errors import DataError, Interrupted
from gpt2lab.model.loss import IGNORE
from gpt2lab.recipe import load_config
from gpt2lab.tracking import Console, read_rows
from gpt2lab.train import train
from tests.data.web import serving
from tests.forked import Before, fork_command, in_pass, patch, wait_until
from tests.test_train import SETTINGS, Witness, flags, rows, sentences, terminate

pytestmark = pytest.mark.usefixtures("workplace", "short_samples")

STEPS = 40
STREAM: dict[str, Any] = SETTINGS | {
    "steps": STEPS, "tokenizer": "bytes", "batch_tokens": 128, "micro_batch": 2, "data.source": "texts", "data.stream": True,
    "data.window_tokens": 512, "data.validation_tokens": 200, "out": "run", "validate_every": 0, "sample_every": 0,
    "checkpoint_every": 3, "system.compare_every": 0, "system.timeout_seconds": 20,
}  # fmt: skip
"""Four steps a block; a checkpoint every three."""


def write_texts(folder: Path) -> None:
    """Five texts, which are read more than once in forty steps."""
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(sentences(30, seed=number))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the texts."""
    write_texts(tmp_path / "texts")
    return tmp_path


def note_samples(rank: int) -> None:
    """Write down the ids of each sample that this rank learns from."""
    draw = Batches.__call__

    def noted(batches: Batches, step: int, micro_step: int) -> Any:
        token_ids, targets = draw(batches, step, micro_step)
        if bool((targets != IGNORE).all()):
            with Path(f"samples-{rank}.jsonl").open("a") as file:
                for place, ids in enumerate(token_ids):
                    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
                    file.write(
                        json.dumps([step, batches.number(micro_step) * batches.micro_batch + place, digest]) + "\n"
                    )
        return token_ids, targets

    patch(Batches, "__call__", noted)


def samples(place: Path) -> list[Any]:
    """What all ranks learned from, in the order of steps and samples; what was learned again after a kill counts once."""
    lines = {line for path in place.glob("samples-*.jsonl") for line in path.read_text().splitlines()}
    return sorted(json.loads(line) for line in lines)


def go(place: Path, processes: int = 1, before: Before = note_samples, **changes: Any) -> list[int]:
    """Train, or go on; the exit codes."""
    with fork_command(processes, ["train", *flags(STREAM | changes)], place, before) as ranks:
        return ranks.wait()


def at_step(rank: int, step: int, act: Callable[[], object]) -> Before:
    """Note the samples, and let one rank act in a step."""

    def before(this: int) -> None:
        note_samples(this)
        in_pass(rank, step, 0, act)(this)

    return before


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_streamed(place: Path, **changes: Any) -> Path:
    """Train in this process."""
    values = STREAM | {"data.source": str(place / "texts"), "out": str(place / "run")} | changes
    return train(load_config([], flags(values)), Console(quiet=True))


# --- Resumed ----------------------------------------------------------------------------------------------------------


def killed_again_and_again(place: Path, kills: int) -> None:
    """Kill a run so often, each time in another step, and go on with one and two processes in turn; compare with a calm one."""
    calm = place / "calm"
    calm.mkdir()
    (calm / "texts").symlink_to(place / "texts")
    small = {"optim.learning_rate": 1e-4, "model.dropout": 0}  # so that rounding is not made larger
    assert go(calm, **small) == [0]
    for number, step in enumerate(sorted(Random(7).sample(range(2, STEPS), kills))):
        processes = 1 + number % 2
        codes = go(place, processes, at_step(processes - 1, step, die), **small)
        assert codes[processes - 1] == -signal.SIGKILL, codes
    assert go(place, 2, **small) == [0, 0]
    assert samples(place) == samples(calm) and len(samples(calm)) == 8 * STEPS
    ours, theirs = rows(place / "run"), rows(calm / "run")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours[1:], theirs[1:], strict=True)) < 1e-5
    assert go(calm, out="other", seed=2, **small) == [0]
    assert rows(calm / "other")[5]["loss"] != theirs[5]["loss"]


def test_killed_at_any_step_and_gone_on_with_on_one_and_two_processes_it_reads_the_same_samples(place: Path) -> None:
    killed_again_and_again(place, 4)


def test_without_its_blocks_and_without_its_journal_it_goes_on_all_the_same(place: Path) -> None:
    run_streamed(place)
    whole = [row["loss"] for row in rows(place / "run")[1:]]
    for lost in (["stream"], ["stream", "stream.jsonl"]):
        stop = Witness(17, terminate)
        values = STREAM | {"data.source": str(place / "texts"), "out": str(place / "again")}
        with pytest.raises(Interrupted):
            train(load_config([], flags(values)), stop.console)
        for name in lost:
            path = place / "again" / name
            _ = [part.unlink() for part in path.rglob("block-*")] if path.is_dir() else path.unlink()
        train(load_config([], flags(values)), Console(quiet=True))
        assert [row["loss"] for row in rows(place / "again")[1:]] == whole
        (place / "again").rename(place / f"again-{len(lost)}")


def test_a_finished_run_leaves_its_journal_and_no_blocks(place: Path) -> None:
    folder = run_streamed(place)
    assert not list(folder.rglob("block-*")) and (folder / "stream.jsonl").stat().st_size > 0
    found = [json.loads(line) for line in (folder / "stream.jsonl").read_text().splitlines()]
    assert len([row for row in found if "sha256" in row]) >= STEPS // 4
    files = [row for row in found if "bytes_in" in row and not row["epoch"]]
    assert sum(row["bytes_in"] for row in files) == sum(path.stat().st_size for path in (place / "texts").iterdir())
    for row in files:
        assert row["bytes_in"] == row["bytes_tokenised"] + row["bytes_held_out"] + sum(
            row["skipped_by_reason"].values()
        )


def test_a_step_is_replayed_and_the_held_out_text_is_scored(place: Path) -> None:
    folder = run_streamed(place)
    with fork_command(1, ["replay", "run", "--step", "22"], place) as replayed:
        assert replayed.wait() == [0], replayed.said(0)
    with fork_command(1, ["eval", "run", "--json"], place) as scored:
        assert scored.wait() == [0], scored.said(0)
        loss = json.loads(scored.said(0))["tasks"]["perplexity"]["loss"]
    assert abs(loss - [row["val_loss"] for row in read_rows(folder / "metrics.jsonl") if "val_loss" in row][-1]) < 1e-4


# --- What breaks ------------------------------------------------------------------------------------------------------


WEB: dict[str, Any] = {
    "steps": 20, "batch_tokens": 16384, "micro_batch": 512, "data.window_tokens": 16384, "data.validation_tokens": 500,
    "model.embed_dim": 8, "model.num_heads": 1, "model.num_layers": 1,
}  # fmt: skip
"""Twenty steps read a file of 300 kB, and a part of the next."""
TEXT = sentences(20_000).encode()[:300_000]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)[1:]]


def test_a_server_that_fails_now_and_then_changes_nothing(tmp_path: Path) -> None:
    with serving(TEXT, "/a.txt") as web:
        sources = [web.url, web.url.replace("a.txt", "b.txt")]
        calm = run_streamed(tmp_path, **WEB | {"data.source": sources, "out": str(tmp_path / "calm")})
        asked = len(web.asked)
        web.faults = [{"cut": 70_000}, {"status": 503}, {"no ranges": 1, "cut": 100_000}]
        rough = run_streamed(tmp_path, **WEB | {"data.source": sources, "out": str(tmp_path / "rough")})
        assert losses(rough) == losses(calm) and not web.faults and len(web.asked) - asked > 5


def test_a_server_that_is_gone_ends_the_run_with_all_that_was_learned(tmp_path: Path) -> None:
    """In the middle of the run the second file is not there; when it is, the same command goes on to the same losses."""
    with serving(TEXT, "/a.txt") as web:
        changes = WEB | {"data.source": [web.url, web.url.replace("a.txt", "b.txt")], "checkpoint_every": 0}
        calm = run_streamed(tmp_path, **changes | {"out": str(tmp_path / "calm")})
        values = STREAM | changes | {"out": str(tmp_path / "run")}
        witness = Witness(2, lambda: web.always.update(status=404))
        with pytest.raises(DataError, match=r"b\.txt|a\.txt"):
            train(load_config([], flags(values)), witness.console)
        newest, _ = checkpoint.latest(tmp_path / "run")
        assert newest is not None and newest.state["step"] == rows(tmp_path / "run")[-1]["step"] >= 2
        web.always.clear()
        train(load_config([], flags(values)), Console(quiet=True))
        assert losses(tmp_path / "run") == losses(calm)


def test_a_signal_while_the_text_is_waited_for_stops_with_all_that_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "60")  # the seconds that a silent server is waited for
    with serving(TEXT * 10, "/a.txt") as web:
        web.always = {"stall": 1, "cut": 2_500_000}  # a text is read a megabyte at a time, and one ahead
        large = {"batch_tokens": 65536, "data.window_tokens": 65536, "micro_batch": 1024, "checkpoint_every": 0}
        values = STREAM | WEB | large | {"data.source": web.url, "steps": 40}
        with fork_command(2, ["train", *flags(values)], tmp_path) as ranks:
            log = tmp_path / "run" / "metrics.jsonl"
            assert wait_until(lambda: log.exists() and len(rows(tmp_path / "run")) > 3, 60), ranks.everything_said
            _until_it_stands_still(tmp_path / "run")
            for pid in ranks.pids:
                os.kill(pid, signal.SIGINT)
            assert ranks.wait(30) == [75, 75], ranks.everything_said
        newest, _ = checkpoint.latest(tmp_path / "run")
        assert newest is not None and newest.state["step"] == rows(tmp_path / "run")[-1]["step"]


def _until_it_stands_still(folder: Path) -> None:
    """Until no step was added for a while."""
    count, since = -1, time.monotonic()
    while time.monotonic() - since < 2:
        if (now := len(rows(folder))) != count:
            count, since = now, time.monotonic()
        time.sleep(0.05)


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "line"),
    [
        ({"steps": None}, 2, "data.stream needs steps"),
        ({"tokenizer": "chars"}, 2, "a stream is never read as a whole"),
        ({"data.packing": "documents"}, 2, "data.packing documents looks at the whole text first"),
        ({"data.source": "nowhere"}, 3, "nowhere"),
        ({"data.source": "-"}, 3, "standard input cannot be read again"),
    ],
)
def test_what_cannot_be_streamed_is_said_in_one_line(
    place: Path, changes: dict[str, Any], code: int, line: str
) -> None:
    values = {key: value for key, value in (STREAM | changes).items() if value is not None}
    with fork_command(1, ["train", *flags(values)], place) as refused:
        assert refused.wait() == [code] and line in refused.said(0) and refused.said(0).count("\n") == 1, refused.said(
            0
        )
    assert not (place / "run").exists()


def test_without_the_hub_its_data_sets_are_refused_in_one_line(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpt2lab", "train", *flags(STREAM | {"data.source": "hf:nobody/nothing"})],
        cwd=place, capture_output=True, text=True, env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1"},
    )  # fmt: skip
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert "no Hub answers at http://127.0.0.1:1" in done.stderr and not (place / "run").exists()


def test_another_source_is_refused_with_the_file_that_differs(place: Path) -> None:
    stop = Witness(10, terminate)
    values = STREAM | {"data.source": str(place / "texts"), "out": str(place / "run")}
    with pytest.raises(Interrupted):
        train(load_config([], flags(values)), stop.console)
    text = place / "texts" / "3.txt"
    good = text.read_bytes()
    for content, said in ((good + b"more", r"3\.txt was .* and is "), (None, r"3\.txt is gone")):
        text.unlink()
        if content is not None:
            text.write_bytes(content)
        with pytest.raises(DataError, match=said):
            train(load_config([], flags(values)), Console(quiet=True))
    text.write_bytes(good)
    (place / "texts" / "new.txt").write_text("new")
    with pytest.raises(DataError, match=r"new\.txt is new"):
        train(load_config([], flags(values)), Console(quiet=True))
