"""What text: every source gives the same documents every time, or says in one line why it gives none."""

import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from gpt2lab import cli
from gpt2lab.config import DataConfig, to_yaml
from gpt2lab.data import named
from gpt2lab.data.prepare import prepare
from gpt2lab.data.sources import Document, described, read_documents, source_files
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.recipe import build_config, flat, load_config, parse_recipe

BAD = Path(__file__).parents[1] / "bad"


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return str(folder)


def complaint(source: str | list[str]) -> str:
    """What the DataError says that this source must end with."""
    with pytest.raises(DataError) as caught:
        read_documents(source)
    assert caught.value.exit_code == 3 and "Fix: " in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# --- Files and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(BAD.glob("*.txt")), ids=lambda path: path.stem)
def test_bad_text_files(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of the same name that ends in .expected says the exit code and the sentence: ``exit 3: ...``."""
    monkeypatch.chdir(BAD)
    code, sentence = path.with_suffix(".expected").read_text().strip().removeprefix("exit ").split(": ", 1)
    assert cli.run(["data", "prepare", path.name, "--out", str(tmp_path / "out")]) == int(code)
    out, err = capsys.readouterr()
    assert sentence in err and "Fix: " in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


def test_the_folder_of_bad_text_files_is_there() -> None:
    assert len(list(BAD.glob("*.txt"))) == len(list(BAD.glob("*.expected"))) >= 6


def test_a_file_is_one_document_with_its_text_as_it_is(tmp_path: Path) -> None:
    folder = Path(write(tmp_path, {"a.txt": "\ufeffcafé\r\nb \n", "b.txt": "café\r\nb \n", "c.txt": "b\ufeff"}))
    assert read_documents(str(folder / "a.txt")) == [Document("a.txt", "café\r\nb \n")]
    assert read_documents(str(folder / "c.txt")) == [Document("c.txt", "b\ufeff")]


def test_a_folder_is_its_texts_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = {
        "b.txt": "b",
        "a/z.md": "z",
        "a/b.PY": "p",
        ".hidden/x.txt": "x",
        "a/.x.txt": "x",
        "c.png": "\x89PNG\r\n\x1a\n\0\0",
        "e.txt": "",
    }
    documents = read_documents(write(tmp_path, files))
    assert documents == [Document("a/b.PY", "p"), Document("a/z.md", "z"), Document("b.txt", "b")]


def test_a_pattern_is_the_files_that_fit(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.txt": "1", "b/2.txt": "2", "b/2.md": "3", "[x].txt": "4"})
    assert [d.text for d in read_documents(f"{tmp_path}/*/*.txt")] == ["1", "2"]
    assert [d.text for d in read_documents(f"{tmp_path}/**/*.txt")] == ["4", "1", "2"]
    assert [d.text for d in read_documents(f"{tmp_path}/[x].txt")] == ["4"], "a file of that name comes first"
    assert "no text" in complaint(f"{tmp_path}/*.csv")


def test_standard_input_is_read_twice(tmp_path: Path) -> None:
    text = "the cat sat on the mat\n" * 50
    words = [sys.executable, "-m", "gpt2lab", "data", "prepare", "-", "--out", "out", "--json"]
    done = subprocess.run(words, input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_tokenised"] == len(text) == json.loads(done.stdout)["bytes_in"]


def test_a_fault_in_a_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a"})
    (tmp_path / "b.txt").write_bytes(b"fine\nb\xe9d\nfine\n" * 9)
    assert f"not text ({tmp_path}): b.txt, line 2: not UTF-8" in complaint(str(tmp_path))


@pytest.mark.parametrize("files", [{}, {"a.txt": ""}], ids=["empty", "empty files"])
def test_a_folder_without_text_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    assert "it has no text in it" in complaint(write(tmp_path, files))


def test_what_is_not_there_is_refused() -> None:
    assert "cannot read the text (no/such.txt): No such file or directory" in complaint("no/such.txt")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "NUL"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    assert "cannot read the text" in complaint(name)


# --- Several sources --------------------------------------------------------------------------------------------------


def test_several_sources_are_their_texts_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "1", "b/x.txt": "2", "b/y.txt": "3", "c/x.txt": "4", "d.txt": "5"})
    sources = [f"{tmp_path}/{name}" for name in ("c", "a.txt", "b", "[d].txt")]
    documents = read_documents(sources)
    assert [d.text for d in documents] == ["4", "1", "2", "3", "5"]
    assert [d.text for d in read_documents(sources[::-1])] == ["5", "2", "3", "1", "4"], "their order is the list's"
    names = [d.name for d in documents]
    assert names == [f"{tmp_path}/{name}" for name in ("c/x.txt", "a.txt", "b/x.txt", "b/y.txt", "d.txt")]
    assert [d.name for d in read_documents(sources[:1])] == ["x.txt"], "of one, names are as short as before"


def test_a_fault_in_one_of_several_sources_says_in_which(tmp_path: Path) -> None:
    write(tmp_path, {"a/x.txt": "1", "b/x.txt": "2", "empty/y.txt": ""})
    sources = [f"{tmp_path}/{name}" for name in ("a", "b")]
    assert f"no text ({tmp_path}/*.csv)" in complaint([*sources, f"{tmp_path}/*.csv"])
    assert f"cannot read the text ({tmp_path}/c)" in complaint([*sources, f"{tmp_path}/c"])
    (tmp_path / "b" / "x.txt").write_bytes(b"fine\nb\xe9d\nfine\n" * 9)
    assert f"not text ({sources[0]}, {sources[1]}): {tmp_path}/b/x.txt, line 2: not UTF-8" in complaint(sources)


def test_the_parts_of_a_folder_are_the_same_shards_as_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(write(tmp_path / "all", {f"{n % 3}/{n:02}.txt": f"the cat sat on mat {n}\n" * 9 for n in range(30)}))
    keys = []
    for out, sources in (
        ("whole", [folder]),
        ("parts", sorted(folder.iterdir())),
        ("other", [folder / "2", folder / "0"]),
    ):
        assert cli.run(["data", "prepare", *map(str, sources), "--out", out, "--json"]) == 0
        keys.append(json.loads(Path(out, "prepared.json").read_text())["key"])
    assert keys[0] == keys[1] != keys[2]
    for name in ("train-00000.bin", "validation-00000.bin"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes() != Path("other", name).read_bytes()
    assert cli.run(["data", "prepare", str(folder), "parts", "--out", "more"]) == 3
    assert "already prepared (parts): it is a folder of shards. Fix: train from it as it is" in capsys.readouterr().err


def test_a_recipe_may_list_sources(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "the cat sat on the mat\n" * 40, "b/c.txt": "the dog sat on the cat\n" * 40})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data:\n  source: [{tmp_path}/a.txt, {tmp_path}/b]\n")
    config = load_config([str(recipe)])
    assert config.data.source == config.data.sources == (f"{tmp_path}/a.txt", f"{tmp_path}/b")
    assert load_config([], [f"--data.source=[{tmp_path}/a.txt, {tmp_path}/b]"]) == config
    again = build_config(parse_recipe(to_yaml(config), "again"))
    assert again == config and flat(again) == flat(config)
    assert prepare(config.data, "bytes").account["bytes_in"] == 2 * 40 * 23
    shards = str(prepare(DataConfig(source=f"{tmp_path}/a.txt"), "bytes").folder)
    assert prepare(DataConfig(source=(shards,)), "bytes").account["bytes_in"] == 40 * 23
    with pytest.raises(DataError, match="already prepared"):
        prepare(DataConfig(source=(shards, f"{tmp_path}/b")), "bytes")


@pytest.mark.parametrize("source", ["3", "[]", "[a, 3]", "[[a]]", "{a: 1}", "[http://me:hunter2@host/x, 3]"])
def test_a_source_that_is_none_is_refused_once(source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"--data.source={source}"])
    assert "--data.source: source should be a text, or a list of texts. Fix" in str(caught.value)


def test_many_sources_are_described_in_a_line() -> None:
    assert described("a") == "a" and described(["a", "b", "c"]) == "a, b, c"
    assert described(["http://me:pw@host:1/x?y#z", "b", "c", "d", "e"]) == "http://host:1/x, b, c and 2 more"


def test_files_have_identities_that_change_with_them(tmp_path: Path, data_folder: Path) -> None:
    write(tmp_path, {"a.txt": "a" * 100_000, "b.txt": "a" * 100_000, "c.txt": ""})
    same, twin, empty = (file.identity for file in source_files(str(tmp_path)))
    assert same == twin != empty and same and empty
    for content in ("b" + "a" * 99_999, "a" * 99_999 + "b", "a" * 100_001, "a" * 99_999):
        (tmp_path / "a.txt").write_text(content)
        assert source_files(str(tmp_path))[0].identity != same
    (docs,) = source_files("python-docs")
    assert docs.identity and next(docs.read()) == next(docs.read())
    (gone,) = source_files(str(tmp_path / "c.txt"))
    (tmp_path / "c.txt").unlink()
    with pytest.raises(DataError, match="No such file"):
        _ = gone.identity


# --- python-docs ------------------------------------------------------------------------------------------------------

HASHES = """
import hashlib
from gpt2lab.data.sources import read_documents
documents = read_documents("python-docs")
print(len(documents), hashlib.sha256(repr([(d.name, d.text) for d in documents]).encode()).hexdigest())
"""


def test_python_docs_are_the_same_bytes_in_every_process() -> None:
    elsewhere = subprocess.run(
        [sys.executable, "-c", HASHES],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    documents = read_documents("python-docs")

    def line(documents: list[Document]) -> str:
        named = [(document.name, document.text) for document in documents]
        return f"{len(named)} {hashlib.sha256(repr(named).encode()).hexdigest()}"

    assert line(documents) == elsewhere != line(documents[1:])


def test_python_docs_are_prose_and_source_and_no_tests_of_python() -> None:
    documents = read_documents("python-docs")
    names = [document.name for document in documents]
    assert len(set(names)) == len(names) > 300 and sum(len(document.text) for document in documents) > 5_000_000
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "site-packages", "idlelib"} & set(Path(name).parts)]
    assert all("\0" not in document.text and document.text for document in documents)


# --- tinyshakespeare --------------------------------------------------------------------------------------------------


def test_a_local_copy_is_read_and_its_hash_is_checked(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2LAB_DATA", str(data_folder))
    (document,) = read_documents("tinyshakespeare")
    assert document.text.startswith("First Citizen:\n") and len(document.text) == 1_115_394
    write(Path("data"), {"tinyshakespeare/input.txt": document.text[:-1]})
    monkeypatch.setenv("GPT2LAB_DATA", "data")
    assert "not tinyshakespeare (data/tinyshakespeare/input.txt): its SHA-256 is not 86c4e6aa9db7" in complaint(
        "tinyshakespeare"
    )
    monkeypatch.delenv("GPT2LAB_DATA")
    assert "not tinyshakespeare (data/tinyshakespeare/input.txt)" in complaint("tinyshakespeare")


def test_without_a_copy_and_without_a_network_it_cannot_be_had() -> None:
    said = complaint("tinyshakespeare")
    assert "no local copy, and the download failed (the cable is cut)" in said and "--data.source=python-docs" in said


def test_it_is_downloaded_once(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, asked = (data_folder / "tinyshakespeare" / "input.txt").read_bytes(), []

    def urlopen(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO(content if len(asked) > 1 else content + b"!")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert "gave other bytes than it should" in complaint("tinyshakespeare")
    read = [read_documents("tinyshakespeare")[0].text.encode() for _ in range(2)]
    assert read == [content, content] and asked == [named.SHAKESPEARE_URL] * 2
