"""What text: every source gives the same documents every time, or says in one line why it gives none."""

import hashlib
import io
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab import cli
from gpt2lab.config import DataConfig
from gpt2lab.data import sources
from gpt2lab.data.sources import HELD_OUT, Document, read_corpus, read_documents, read_text
from gpt2lab.errors import DataError

BAD = Path(__file__).parents[1] / "bad"


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return str(folder)


def complaint(source: str) -> str:
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
    assert len(list(BAD.glob("*.txt"))) == len(list(BAD.glob("*.expected"))) >= 7


def test_a_file_is_one_document_with_its_text_as_it_is(tmp_path: Path) -> None:
    folder = Path(write(tmp_path, {"a.txt": "\ufeffcafé\r\nb \n", "b.txt": "café\r\nb \n", "c.txt": "b\ufeff"}))
    assert read_documents(str(folder / "a.txt")) == [Document("a.txt", "café\r\nb \n")]
    assert read_text(folder / "a.txt") == read_text(folder / "b.txt") != read_text(folder / "c.txt") == "b\ufeff"


def test_a_folder_is_its_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = {
        "b.txt": "b",
        "a/z.md": "z",
        "a/b.PY": "p",
        ".hidden/x.txt": "x",
        "a/.x.txt": "x",
        "c.png": "x",
        "e.txt": "",
    }
    documents = read_documents(write(tmp_path, files))
    assert documents == [Document("a/b.PY", "p"), Document("a/z.md", "z"), Document("b.txt", "b")]


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b/c.txt": "b\0"})
    assert f"({tmp_path / 'b/c.txt'}): a NUL byte at offset 1" in complaint(str(tmp_path))


@pytest.mark.parametrize("files", [{}, {"a.png": "x"}, {"a.txt": ""}], ids=["empty", "no text files", "empty files"])
def test_a_folder_without_text_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    assert "has no text in it" in complaint(write(tmp_path, files))


def test_what_is_not_there_is_refused() -> None:
    assert "cannot read the text (no/such.txt): No such file or directory" in complaint("no/such.txt")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "NUL"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    assert "cannot read the text" in complaint(name)


# --- What is held out -------------------------------------------------------------------------------------------------


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


@given(st.lists(st.text("abc \n", min_size=1, max_size=30), min_size=HELD_OUT, max_size=40, unique=True))
def test_whole_documents_are_held_out(drawn: list[str]) -> None:
    documents = [Document(f"{i}.txt", text) for i, text in enumerate(drawn)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read_documents", lambda source: documents)
        corpus = read_corpus(DataConfig(source="drawn"))
        renamed = [Document(f"x{i}.txt", text) for i, text in enumerate(reversed(drawn))]
        patch.setattr(sources, "read_documents", lambda source: renamed)
        again = read_corpus(DataConfig(source="drawn"))
    assert corpus.validation and not set(texts(corpus.train)) & set(texts(corpus.validation))
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(drawn)
    held, wanted = sum(map(len, texts(corpus.validation))), sum(map(len, drawn)) // HELD_OUT
    assert wanted <= held < wanted + 30
    assert texts(again.validation) == texts(corpus.validation), "names or order decide what is held out"


def test_another_text_holds_out_other_documents() -> None:
    held_out = set()
    for draw in range(5):
        documents = [Document(str(i), f"{draw} {i} {'x' * 50}") for i in range(20)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "read_documents", lambda source, documents=documents: documents)
            held_out.add(tuple(sorted(document.name for document in read_corpus(DataConfig(source="x")).validation)))
    assert len(held_out) > 1


def test_the_twin_of_a_held_out_document_is_not_learned_from(tmp_path: Path) -> None:
    source = write(tmp_path, {f"{copy}/{i:02}.txt": f"{i:02}" * 50 for i in range(15) for copy in "ab"})
    corpus = read_corpus(DataConfig(source=source))
    assert not set(texts(corpus.train)) & set(texts(corpus.validation))
    assert corpus.validation and len(corpus.train) + len(corpus.validation) == 30


def test_of_few_documents_the_last_tenth_of_each_is_held_out(tmp_path: Path) -> None:
    files = {"a.txt": "0123456789" * 10, "b.txt": "x" * 15}
    corpus = read_corpus(DataConfig(source=write(tmp_path, files)))
    assert texts(corpus.train) == ["0123456789" * 9, "x" * 13]
    assert texts(corpus.validation) == ["0123456789", "xx"]


def test_a_validation_text_of_its_own_leaves_the_source_whole(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "learn" * 10, "b.txt": "validate"})
    config = DataConfig(source=str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt"))
    assert (texts(read_corpus(config).train), texts(read_corpus(config).validation)) == (["learn" * 10], ["validate"])


# --- python-docs ------------------------------------------------------------------------------------------------------

HASHES = """
import hashlib
from gpt2lab.config import DataConfig
from gpt2lab.data.sources import read_corpus
corpus = read_corpus(DataConfig(source="python-docs"))
for documents in (corpus.train, corpus.validation):
    print(len(documents), hashlib.sha256(repr([(d.name, d.text) for d in documents]).encode()).hexdigest())
"""


def test_python_docs_are_the_same_bytes_in_every_process() -> None:
    elsewhere = subprocess.run(
        [sys.executable, "-c", HASHES],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    corpus = read_corpus(DataConfig(source="python-docs"))

    def line(documents: list[Document]) -> str:
        named = [(document.name, document.text) for document in documents]
        return f"{len(named)} {hashlib.sha256(repr(named).encode()).hexdigest()}"

    assert [line(corpus.train), line(corpus.validation)] == elsewhere
    assert line(corpus.train[1:]) != line(corpus.train[:-1]) != elsewhere[0]


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
    assert read == [content, content] and asked == [sources.SHAKESPEARE_URL] * 2
