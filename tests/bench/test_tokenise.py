"""Text to ids, ours and the usual ways: same text, same ids, and the numbers are those of the rounds."""

import gzip
import importlib.util
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2lab.bench import tokenise as module
from gpt2lab.bench.tokenise import OURS, TokeniseBench, bench_tokenise, read, table
from gpt2lab.errors import ConfigError, DataError, ProcessError
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.tracking import Console

STORY = "The cat's hat is the cat's.\r\n\r\nThe end, isn't it?  Yes: 1, 22, 333! café 日本語 🙂\n"
TOKENIZER = Tokenizer.train_bpe([STORY], 300)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TokeniseBench:
    """Two documents, one of them compressed, and a tokenizer with merges."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "one.txt").write_bytes(STORY.encode() * 9)
    (folder / "two.txt.gz").write_bytes(gzip.compress(STORY.encode()))
    TOKENIZER.save(folder)
    files = tuple(str(folder / name) for name in ("one.txt", "two.txt.gz"))
    return TokeniseBench(files, tokenizer=str(folder), rounds=1, out=str(folder / "out"))


@pytest.fixture(scope="module")
def result(settings: TokeniseBench) -> dict[str, Any]:
    """One real run, small, of all that is installed."""
    return bench_tokenise(settings, Console(quiet=True))


def installed() -> list[str]:
    there = [name for name in ("tiktoken", "tokenizers") if importlib.util.find_spec(name)]
    return [f"datasets and {name}" for name in there if importlib.util.find_spec("datasets")]


def test_every_way_that_is_installed_is_measured(settings: TokeniseBench, result: dict[str, Any]) -> None:
    assert [row["who"] for row in result["rows"]] == [OURS, *installed()]
    tokens = sum(len(TOKENIZER.encode(read(Path(file)))) for file in settings.files)
    assert (result["bytes"], result["tokens"]) == (10 * len(STORY.encode()), tokens)
    assert json.loads(Path(settings.out, "tokenise.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in Path(settings.out).iterdir()] == ["tokenise.json"]


def test_the_numbers_are_those_of_the_rounds(result: dict[str, Any]) -> None:
    rounds = [round_["seconds"] for round_ in result["rounds"]["kept"]]
    assert len(rounds) == 1
    for row in result["rows"]:
        seconds = [round_[row["who"]] for round_ in rounds]
        assert row["megabytes_per_second"]["high"] == pytest.approx(result["bytes"] / 1e6 / min(seconds))
        assert row["tokens_per_second"] == pytest.approx(result["tokens"] / statistics.median(seconds))
        if row["who"] != OURS:
            ratios = sorted(round_[row["who"]] / round_[OURS] for round_ in rounds)
            name = f"{OURS} over {row['who']}"
            assert result["ratios"][name] == pytest.approx(statistics.median(ratios))
            assert result["ranges"][name] == pytest.approx([ratios[0], ratios[-1]])
    lines = table(result).splitlines()
    assert all(any(line.startswith(row["who"]) for line in lines) for row in result["rows"])


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another way beside ours, which gives no ids at all."""
    monkeypatch.setattr(module, "find_spec", lambda name: name != "tiktoken")
    monkeypatch.setattr(module, "with_datasets", lambda *given: lambda: np.zeros(0, np.int32))


@pytest.mark.usefixtures("another")
def test_other_ids_are_no_result(settings: TokeniseBench, tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match=r"datasets and tokenizers.*0 ids, and ours are [1-9]"):
        bench_tokenise(replace(settings, out=str(tmp_path), rounds=1), Console(quiet=True))
    assert not (tmp_path / "tokenise.json").exists()


def test_settings_that_cannot_work(settings: TokeniseBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT2LAB_DATA", raising=False)
    Tokenizer.bytes().save(tmp_path)
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b\x08")
    for changes, error, sentence in (
        ({"rounds": 0}, ConfigError, "--rounds=0"),
        ({"processes": 1}, ConfigError, "--processes=1"),
        ({"files": ()}, ConfigError, "no local folder of books"),
        ({"files": settings.files[:1]}, ConfigError, "too few files"),
        ({"files": ("nothing.txt",)}, ConfigError, "nothing.txt is no file"),
        ({"files": ("broken.gz", "broken.gz")}, DataError, "unreadable text"),
        ({"tokenizer": str(tmp_path)}, ConfigError, "its tokens are not made of merges"),
    ):
        with pytest.raises(error, match=sentence):
            bench_tokenise(replace(settings, **{"out": "out"} | changes), Console(quiet=True))
