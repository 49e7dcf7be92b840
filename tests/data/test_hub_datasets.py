"""Data sets on the Hub: the files of a configuration's split are those that its README or their names say, at one commit."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import constants

from gpt2lab import cli
from gpt2lab.data.hub_datasets import CONVERTED, hub_files
from gpt2lab.data.remote import RemoteFile
from gpt2lab.data.sources import described, open_source, read_documents, source_files
from gpt2lab.errors import ConfigError, DataError
from tests.fakehub import ROOT, FakeHub, child_environment, serving

NAME = "me/tales"


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts), "score": [0.5] * len(texts)}), file)
    return file.getvalue()


def readme(*configs: Any, text: str = "# Tales\n---\nof cats\n") -> bytes:
    head = {"license": "mit", "dataset_info": [{"config_name": "old", "features": [{"name": "x", "dtype": "no such"}]}]}
    return f"---\n{yaml.safe_dump(head | {'configs': list(configs)})}---\n{text}".encode()


def config(name: str, *, default: bool = False, **splits: Any) -> dict[str, Any]:
    files = [{"split": split, "path": path} for split, path in splits.items()]
    return {"config_name": name, "data_files": files} | ({"default": True} if default else {})


BY_NAME = {
    "README.md": b"# No settings\n",
    "data/train-00000-of-00002.parquet": parquet("one", "two"),
    "data/train-00001-of-00002.parquet": parquet("three"),
    "data/validation-00000-of-00001.parquet": parquet("four"),
    "archive/old.parquet": parquet("never"),
    "logo.png": b"\x89PNG",
    "dataset_infos.json": b"{no json",
    ".gitattributes": b"*.parquet filter=lfs\n",
}
BY_README = {
    "README.md": readme(
        config("small", default=True, train="sample/*.jsonl"),
        config("full", train=["full/b.jsonl", "full/a.jsonl"], heldout="full/c.jsonl"),
        {"config_name": "below", "data_dir": "below"},
    ),
    "sample/1.jsonl": lines("s1"),
    "sample/2.jsonl": lines("s2", "s3"),
    "full/a.jsonl": lines("a"),
    "full/b.jsonl": lines("b"),
    "full/c.jsonl": lines("c"),
    "below/test.jsonl": lines("d"),
    "other.jsonl": lines("never"),
}
SCRIPTED = {"README.md": b"---\nlicense: mit\n---\n", "tales.py": b"raise SystemExit('run!')", "urls.txt": b"x\n"}
COPY = {
    "plain/train/0000.parquet": parquet("p1"),
    "plain/train/0001.parquet": parquet("p2"),
    "plain/test/0000.parquet": parquet("p3"),
    "fancy/partial-train/0000.parquet": parquet("f1"),
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(monkeypatch, tmp_path / "hub") as fake:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        fake.names = (NAME, "tales")
        init = RemoteFile.__init__
        monkeypatch.setattr(
            RemoteFile,
            "__init__",
            lambda self, *args, **more: init(self, *args, **more | {"sleep": fake.pauses.append}),
        )
        yield fake
    assert not (tmp_path / "hub").exists(), "nothing is kept"


def texts(source: str) -> list[str]:
    return [document.text for document in read_documents(source)]


def complaint(source: str, kind: type[DataError] | type[ConfigError] = DataError) -> str:
    """What the error says that this source must end with."""
    with pytest.raises(kind) as caught:
        source_files(source)
    assert "\n" not in str(caught.value) and ". Fix: " in str(caught.value)
    return str(caught.value)


# --- Which files ------------------------------------------------------------------------------------------------------

FOUND: dict[str, tuple[dict[str, bytes], str, list[str]]] = {
    "by their names": (BY_NAME, f"hf:{NAME}", ["one", "two", "three"]),
    "by their names, another split": (BY_NAME, f"hf:{NAME}:validation", ["four"]),
    "of one part": (BY_NAME, "hf:tales", ["one", "two", "three"]),
    "of one part, with a split": (BY_NAME, "hf:tales:validation", ["four"]),
    "by the README": (BY_README, f"hf:{NAME}", ["s1", "s2", "s3"]),
    "a configuration, in its order": (BY_README, f"hf:{NAME}/full", ["b", "a"]),
    "a configuration and a split": (BY_README, f"hf:{NAME}/full:heldout", ["c"]),
    "one part, revision and configuration": (BY_README, "hf:tales@main/full", ["b", "a"]),
    "the only split": (BY_README, f"hf:{NAME}/below", ["d"]),
    "one file": ({"tales.csv": b"id,text\n1,a tale\n2,a story\n"}, f"hf:{NAME}", ["a tale", "a story"]),
    "settings beside a README": (
        {"a.jsonl": lines("a"), "b.jsonl": lines("b"), ".huggingface.yaml": readme(config("x", train="b.jsonl"))[4:-26]},
        f"hf:{NAME}",
        ["b"],
    ),
    "a script, and settings that do without it": (
        SCRIPTED | {"README.md": readme(config("x", train="a.jsonl")), "a.jsonl": lines("a")}, f"hf:{NAME}", ["a"]
    ),
    "strange names": ({"data/train-a b%41#?&.jsonl": lines("strange")}, f"hf:{NAME}", ["strange"]),
    "a name that leads out": (
        {"../../x.jsonl": lines("no"), "/x.jsonl": lines("no"), "a.jsonl": lines("a")}, f"hf:{NAME}", ["a"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "source", "expected"), FOUND.values(), ids=FOUND)
def test_a_split_is_the_files_that_the_repository_says(
    files: dict[str, bytes], source: str, expected: list[str], fake: FakeHub
) -> None:
    fake.commit(files)
    assert texts(source) == expected
    assert len([path for _, path, _ in fake.asked if "/api/" in path]) == 1


def test_a_script_is_not_run_and_the_copy_in_parquet_is_read(fake: FakeHub) -> None:
    fake.commit(SCRIPTED)
    assert "a script makes it, which is not run, and its copy in Parquet cannot be had" in complaint(f"hf:{NAME}")
    fake.commit(COPY, branch=CONVERTED)
    assert texts(f"hf:{NAME}/plain") == ["p1", "p2"] and texts(f"hf:{NAME}/plain:test") == ["p3"]
    assert "which configuration is meant is not clear; there are fancy, plain." in complaint(f"hf:{NAME}")
    said = complaint(f"hf:{NAME}/fancy")
    assert "which split is meant is not clear; there are partial-train." in said, "a part is taken by its name only"
    assert f"Fix: such as hf:{NAME}/fancy:partial-train." in said
    assert texts(f"hf:{NAME}/fancy:partial-train") == ["f1"]


UNKNOWN = {
    f"hf:{NAME}/large": "it has no configuration 'large'; there are small, full, below. Fix: such as hf:me/tales/small.",
    f"hf:{NAME}/full:test": "it has no split 'test'; there are train, heldout. Fix: such as hf:me/tales/full:train.",
    f"hf:{NAME}@v9": "no repository of that name, or not that revision or file (404)",
    "hf:me/nothing": "the Hub refuses it (401): it is private or gated, or there is none of that name",
    "hf:": "'hf:' is not hf:OWNER/NAME, with @REVISION, /CONFIG and :SPLIT after it",
    "hf:a/../b": "is not hf:OWNER/NAME",
    "hf:me/tales@": "is not hf:OWNER/NAME",
    "hf:me/tales:": "is not hf:OWNER/NAME",
}


@pytest.mark.parametrize(("source", "sentence"), UNKNOWN.items(), ids=UNKNOWN)
def test_what_is_not_there_is_said_with_what_is(source: str, sentence: str, fake: FakeHub) -> None:
    fake.commit(BY_README)
    assert sentence in complaint(source)


def test_without_a_default_all_configurations_are_named(fake: FakeHub) -> None:
    names = [f"c{n:02}" for n in range(30)]
    fake.commit({"README.md": readme(*(config(name, train="a.jsonl") for name in names)), "a.jsonl": lines("a")})
    said = complaint(f"hf:{NAME}")
    assert "which configuration is meant is not clear; there are c00, c01" in said and "c19 and 10 more. Fix" in said
    assert texts(f"hf:{NAME}/c29") == ["a"]


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({"README.md": b"# Hello"}, "finds no data files in it"),
    "no text": ({"a.xyz": b"?"}, "finds no data files in it"),
    "files of this machine": ({"README.md": readme(config("x", train="/etc/passwd"))}, "names files that are not in it"),
    "files above": ({"README.md": readme(config("x", train="../../../etc/passwd"))}, "names files that are not in it"),
    "files elsewhere": ({"README.md": readme(config("x", train="http://127.0.0.1:1/x"))}, "names files that are not in it"),
    "files of another repository": ({"README.md": readme(config("x", train="hf://datasets/a/b/x"))}, "names files that are"),
    "files in a folder above": ({"README.md": readme({"config_name": "x", "data_dir": "../.."})}, "names files that are not"),
    "files that are not there": ({"README.md": readme(config("x", train="no.jsonl"))}, "finds no data files in it"),
    "no YAML": ({"README.md": b"---\na: [\n---\n"}, "its README.md cannot be read"),
    "no list": ({"README.md": b"---\nconfigs: 5\n---\n"}, "its README.md cannot be read: its settings are no list"),
    "aliases": ({"README.md": b"---\na: &a [1]\nconfigs: [*a, *a]\n---\n"}, "it uses YAML aliases"),
    "brackets without end": ({"README.md": b"---\nconfigs: " + b"[" * 2**22 + b"\n---\n"}, "or lists in lists without end"),
    "a file that is a folder": ({"a": b"", "a/b.txt": b"b"}, "finds no data files in it"),
    "a name that no file can have": ({"a" * 300: b""}, "finds no data files in it"),
    "no configurations": ({"README.md": b"---\nconfigs: [1, 2]\n---\n", "a.txt": b"a"}, "lists configurations without names"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_repository_that_cannot_be_used_is_one_line(files: dict[str, bytes], sentence: str, fake: FakeHub) -> None:
    fake.commit(files)
    said = complaint(f"hf:{NAME}")
    assert said.startswith(f"unusable data set (hf:{NAME}): ") and sentence in said
    assert gettempdir() not in said and "files/" not in said


# --- How they are read ------------------------------------------------------------------------------------------------


def test_files_have_names_and_identities_and_are_not_asked_for_before_they_are_read(fake: FakeHub) -> None:
    commit = fake.commit(BY_README)
    files = source_files(f"hf:{NAME}/full")
    assert fake.got() == ["README.md"]
    assert [file.name for file in files] == ["full/b.jsonl", "full/a.jsonl"]
    assert [file.identity for file in files] == [f"{NAME}@{commit}/full/b.jsonl", f"{NAME}@{commit}/full/a.jsonl"]
    assert fake.got() == ["README.md"]
    several = source_files([f"hf:{NAME}/full", f"hf:{NAME}"])
    assert several[0].name == f"hf:{NAME}/full: full/b.jsonl"


def test_the_commit_is_pinned(fake: FakeHub) -> None:
    first = fake.commit(BY_README)
    files = source_files(f"hf:{NAME}/full")
    fake.commit(BY_README | {"full/a.jsonl": lines("newer")})
    assert [piece.text for file in files for piece in file.read() if hasattr(piece, "text")] == ["b", "a"]
    assert texts(f"hf:{NAME}/full") == ["b", "newer"] and texts(f"hf:{NAME}@{first}/full") == ["b", "a"]


def test_the_token_is_for_the_hub_alone(fake: FakeHub) -> None:
    fake.commit(BY_NAME)
    assert texts(f"hf:{NAME}") == ["one", "two", "three"]
    told = {("cdn" if "/cdn/" in path else "hub"): headers.get("authorization") for _, path, headers in fake.asked}
    assert told == {"hub": "Bearer hf_secret", "cdn": None}


def test_large_files_go_on_where_they_broke(fake: FakeHub) -> None:
    stories = [os.urandom(300).hex() for _ in range(600)]
    fake.commit({"data/train-00000-of-00001.parquet": parquet(*stories), "b.txt": b"b"})
    fake.faults["data/train-00000-of-00001.parquet"] = [{"cut": 150_000}, {"status": 503}, {"cut": 9}]
    assert texts(f"hf:{NAME}") == stories and fake.pauses == [1, 2, 1]
    ranges = [headers.get("range") for _, path, headers in fake.asked if "/cdn/" in path]
    assert ranges[0] is None and len(ranges) == 4 and all(ranges[1:])


def test_prepared_they_are_read_once(fake: FakeHub) -> None:
    fake.commit(BY_NAME)
    reading = open_source(f"hf:{NAME}")
    first = list(reading())
    fake.asked.clear()
    assert list(reading()) == first and not fake.asked


# --- Without a Hub ----------------------------------------------------------------------------------------------------


def test_nobody_is_there(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DataError) as caught:
        hub_files(f"hf:{NAME}", sleep=fake.pauses.append)
    said = str(caught.value)
    assert said.startswith(f"cannot be had from the Hub (hf:{NAME}): no Hub answers at http://127.0.0.1:1 in 2 tries (")
    assert said.endswith("Fix: go online and give the same command again, or give a local folder in its place.")
    assert fake.pauses == [1]


def test_offline_by_the_environment(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Fix: run once without HF_HUB_OFFLINE=1" in complaint(f"hf:{NAME}")
    assert not fake.asked


def test_without_the_library_one_line_says_how_to_get_it(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    fake.commit(BY_NAME)
    assert "Fix: pip install 'gpt2lab[hub]'." in complaint(f"hf:{NAME}", ConfigError)
    fake.commit(SCRIPTED)
    fake.commit({name: content for name, content in COPY.items() if "plain" in name}, branch=CONVERTED)
    assert texts(f"hf:{NAME}") == ["p1", "p2"], "the copy needs no library"


def test_in_a_process_of_its_own(fake: FakeHub, tmp_path: Path) -> None:
    """The environment alone says where the Hub is; and a Hub that is gone ends a training with one line."""
    fake.commit(BY_NAME | {"data/train-00000-of-00002.parquet": parquet("the cat sat on the mat. " * 50)})
    command = [sys.executable, "-m", "gpt2lab"]
    environment = child_environment(fake, tmp_path / "home") | {"GPT2LAB_CACHE": str(tmp_path / "cache")}
    words = ["data", "prepare", f"hf:{NAME}", "--validation", f"hf:{NAME}:validation", "--out", "out", "--json"]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr.startswith("tokenised 1,20") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert json.loads(done.stdout)["validation"]["bytes"] == len("four")
    recipes = [str(ROOT / "recipes" / name) for name in ("gpt2.yaml", "text/fineweb.yaml")]
    words, gone = ["train", *recipes, "--tokenizer=bytes", "--out=run"], {"HF_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([*command, *words], env=environment | gone, capture_output=True, text=True, timeout=100)
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and not Path("run").exists()
    assert "(hf:HuggingFaceFW/fineweb/sample-10BT): no Hub answers at http://127.0.0.1:1" in done.stderr


RECIPES = sorted((ROOT / "recipes" / "text").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_named_text_without_a_hub_is_one_line(
    recipe: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.run(["train", str(ROOT / "recipes" / "tiny.yaml"), str(recipe), "--out=run"]) == 3
    out, err = capsys.readouterr()
    source = yaml.safe_load(recipe.read_text())["data"]["source"]
    assert f"cannot be had from the Hub ({source}): HF_HUB_OFFLINE is set. Fix: " in err and err.count("\n") == 1
    assert not out and not Path("run").exists() and described(source) == source


def test_there_are_named_texts() -> None:
    assert {path.stem for path in RECIPES} >= {"fineweb", "openwebtext", "tinystories", "wikitext"}
