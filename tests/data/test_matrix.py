"""No byte of a folder is lost, nothing but the text decides the shards, and shards that change under a run end it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2lab.config import DataConfig
from gpt2lab.data import text as text_module
from gpt2lab.data.prepare import prepare
from gpt2lab.errors import DataError
from gpt2lab.recipe import load_config
from gpt2lab.settle import settle
from gpt2lab.tokenizer import Tokenizer
from tests.data import nasties
from tests.forked import Forked, fork_command
from tests.test_train import tree

BYTES = Tokenizer.bytes()

# --- Every byte -------------------------------------------------------------------------------------------------------


def test_a_folder_of_nasty_files_is_accounted_for_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in one preparation, but those that want fields of their own; so many faults are refused otherwise."""
    monkeypatch.setattr(text_module, "MOST_FAULTS", 1.0)
    (folder := tmp_path / "files").mkdir()
    files = [nasty for nasty in nasties.write(folder) if not nasty.fields]
    for path in set(folder.iterdir()) - {folder / nasty.name for nasty in files}:
        path.unlink()
    assert len(files) >= 60
    prepared = prepare(DataConfig(source=str(folder)), "bytes", folder=tmp_path / "p")
    account = prepared.account
    assert account["bytes_in"] == sum(nasty.bytes_in for nasty in files)
    assert account["bytes_in"] == account["bytes_tokenised"] + account["bytes_skipped"]
    assert account["bytes_skipped"] == sum(account["skipped_by_reason"].values()) > 10**6
    counted = [split.read(0, len(split)) for split in (prepared.train, prepared.validation)]
    assert account["bytes_tokenised"] == sum(int((ids != BYTES.end_of_text).sum()) for ids in counted)


# --- The same shards --------------------------------------------------------------------------------------------------

CELLS: list[dict[str, str]] = [
    {"workers": "1"},
    {"workers": "2", "LC_ALL": "C", "PYTHONHASHSEED": "0"},
    {"workers": "2", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "1"},
    {"workers": "1", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "random", "TZ": "Asia/Kathmandu", "order": "reversed"},
    {"workers": "2", "LC_ALL": "de_DE.UTF-8", "PYTHONHASHSEED": "random", "TZ": "America/Lima", "order": "reversed"},
]
"""How a text is prepared: workers, the order in which its files were made, and the environment."""


def write_files(folder: Path, *, reverse: bool, last: str = "the end") -> Path:
    """Files that people of several countries would order in several ways."""
    folder.mkdir()
    rows = [{"text": f"Zeile {n} \u00e4\u00f6\u00fc", "id": n} for n in range(20)]
    table = pa.table({"text": [row["text"] for row in rows[::-1]]})
    contents: dict[str, Callable[[Path], object]] = {
        "Zebra.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        "apfel.csv": lambda path: path.write_text("id,text\n" + "".join(f'{n},"row {n}"\n' for n in range(20))),
        "rows.parquet": lambda path: pq.write_table(table, path),
        "last.txt": lambda path: path.write_text(last),
    }
    names = ["\u00c4pfel", "B", "a", "_", "I", "\u0131", "\u00df", "ss", "10", "9", "\U0001f600"]
    contents |= {f"{name}.txt": lambda path: path.write_text(f"This is {path.stem}. " * 9) for name in names}
    for name, write in sorted(contents.items(), reverse=reverse):
        write(folder / name)
    return folder


@pytest.fixture
def places() -> Iterator[dict[str, Path]]:
    """The same files in two folders that list them in two orders; where /tmp orders by itself, memory does not."""
    for root in (tempfile.gettempdir(), "/dev/shm"):  # noqa: S108
        with tempfile.TemporaryDirectory(dir=root) as place:
            orders = ("sorted", "reversed")
            found = {order: write_files(Path(place, order), reverse=order == "reversed") for order in orders}
            first, second = map(os.listdir, found.values())
            if first != second:
                assert sorted(first) == sorted(second)
                yield found
                return
    pytest.fail("no file system at hand lists files in the order in which they were made")


def test_workers_orders_locales_hash_seeds_and_time_zones_change_nothing(
    places: dict[str, Path], tmp_path: Path
) -> None:
    places["changed"] = write_files(tmp_path / "changed", reverse=False, last="the ene")
    processes, outs = [], []
    for number, cell in enumerate([*CELLS, {"workers": "1", "order": "changed"}]):
        environment = {key: value for key, value in cell.items() if key.isupper()}
        source, outs = places[cell.get("order", "sorted")], [*outs, tmp_path / f"out-{number}"]
        words = [
            "data",
            "prepare",
            str(source),
            "--tokenizer=bpe:300",
            "--workers",
            cell["workers"],
            "--out",
            str(outs[-1]),
        ]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
        kept |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "gpt2lab", *words], env=kept | environment, stdout=subprocess.DEVNULL
            )
        )
        if len(processes) % 2 == 0:
            assert [process.wait() for process in processes[-2:]] == [0, 0]
    assert all(process.wait() == 0 for process in processes)
    *same, changed = map(tree, outs)
    assert all(shards == same[0] for shards in same)
    assert changed.keys() == same[0].keys() and changed != same[0]


# --- Shards that change under a run -----------------------------------------------------------------------------------


def deleted(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name("train-00009.bin"))


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\1\0" * 10)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def changed(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(b"x" * 8000)


def another(path: Path) -> None:
    shutil.copy(path.with_name("validation-00000.bin"), path)


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def wait_for_rows(run: Path, rows: int, ranks: Forked) -> None:
    path, deadline = run / "metrics.jsonl", time.monotonic() + 20
    while not path.exists() or path.read_bytes().count(b"\n") < rows:
        assert time.monotonic() < deadline, ranks.everything_said
        time.sleep(0.002)


@pytest.mark.parametrize("change", [deleted, renamed, appended, cut, changed, another, touched])
def test_shards_that_change_during_training_end_it(change: Callable[[Path], None], tmp_path: Path) -> None:
    """Control: a file that was only touched is looked at again, and is the same."""
    (tmp_path / "a.txt").write_text("It was a dark and stormy night. " * 300)
    shards = prepare(DataConfig(source=str(tmp_path / "a.txt")), "bytes", folder=tmp_path / "shards").folder
    recipe = {
        "data.source": str(shards), "out": str(tmp_path / "run"), "steps": 10**6, "seq_len": 16, "micro_batch": 1,
        "batch_tokens": 16, "validate_every": 10**6, "checkpoint_every": 10**6, "sample_every": 0,
        "model.embed_dim": 16, "model.num_heads": 2, "model.num_layers": 1, "system.device": "cpu",
    }  # fmt: skip
    with fork_command(1, ["train", *(f"--{key}={value}" for key, value in recipe.items())], tmp_path) as ranks:
        wait_for_rows(tmp_path / "run", 3, ranks)
        change(shards / "train-00000.bin")
        if change is touched:
            wait_for_rows(tmp_path / "run", (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n") + 20, ranks)
            return
        assert ranks.wait(30) == [3]
        [line] = [line for line in ranks.said(0).splitlines() if line.startswith("gpt2lab: ")]
    assert line.startswith(f"gpt2lab: damaged shard ({shards / 'train-00000.bin'}") and "Fix: remove" in line


def test_a_text_without_validation_text_is_refused(tmp_path: Path) -> None:
    """Token files of others, since of a text a tenth is held out. Control: one token more is enough."""
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    for size, enough in ((1, False), (2, True)):
        np.arange(size, dtype="<u2").tofile(tmp_path / "val.bin")
        words = [f"--data.source={tmp_path}", "--tokenizer=bytes", "--seq_len=4", "--batch_tokens=4"]
        with nullcontext() if enough else pytest.raises(DataError, match="nothing is left to validate on"):
            settle(load_config([], words))
