"""Text to ids by several processes: the ids that one would give, in order, whatever happens to a worker."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab import tokenizer as pieces_module
from gpt2lab.data import tokenise as module
from gpt2lab.data.records import Piece
from gpt2lab.data.tokenise import Tokens, tokenise
from gpt2lab.errors import DataError, ProcessError
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer

STORY = "The cat's hat is the cat's.\n\nThe end, isn't it?  Yes: 1, 22, 333! café 日本語 🙂\n"
DOCUMENTS = {
    "long": STORY * 40,
    "empty": "",
    "special": f"a{END_OF_TEXT}b",
    "mark": "\ufeffx",
    "short": " ",
    "end": STORY,
}
TOKENIZER = Tokenizer.train_bpe([STORY], 300)


def cut(documents: dict[str, str], ends: list[int]) -> Iterator[Piece]:
    """Documents in pieces that end at these places of each."""
    for name, text in documents.items():
        places = [0, *sorted(min(end, len(text)) for end in ends), len(text)]
        for start, end in pairwise(places[:-1]):
            yield Piece(name, text[start:end], last=False)
        yield Piece(name, text[places[-2] :], last=True)


def gathered(found: Iterator[Tokens]) -> dict[str, tuple[list[int], int]]:
    """Ids and bytes of each document, which must end before the next one begins."""
    documents: dict[str, tuple[list[int], int]] = {}
    ended = True
    for tokens in found:
        assert ended == (tokens.name not in documents) and tokens.ids.dtype == np.int32
        ids, size = documents.get(tokens.name, ([], 0))
        documents[tokens.name] = (ids + tokens.ids.tolist(), size + tokens.bytes)
        ended = tokens.last
    assert ended
    return documents


def expected(documents: dict[str, str]) -> dict[str, tuple[list[int], int]]:
    """By the library, each document in one go."""
    library = TOKENIZER._backend
    return {
        name: ([*library.encode(text).ids, TOKENIZER.end_of_text], len(text.encode()))
        for name, text in documents.items()
    }


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_PIECE", 64)
    monkeypatch.setattr(module, "_BATCH", 256)


def workers() -> list[psutil.Process]:
    """The processes at work for us."""
    return [child for child in psutil.Process().children() if "gpt2lab.data.tokenise" in child.cmdline()]


# --- The same ids -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4000)))
def test_where_pieces_end_changes_nothing(ends: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "_PIECE", 64)
        found = list(tokenise(cut(DOCUMENTS, ends), TOKENIZER))
    assert gathered(iter(found)) == expected(DOCUMENTS)
    assert sum(tokens.name == "long" for tokens in found) > 10


def test_pieces_encoded_as_they_come_would_change_something() -> None:
    [*found] = cut({"long": DOCUMENTS["long"]}, [1, 77, 500])
    ids = [i for ids in module.encode(found, TOKENIZER) for i in ids.tolist()]
    assert ids != expected(DOCUMENTS)["long"][0] and TOKENIZER.decode(ids[:-1]) == DOCUMENTS["long"]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.usefixtures("small_pieces")
def test_how_many_workers_there_are_changes_nothing(count: int) -> None:
    found, most = [], 0
    for tokens in tokenise(cut(DOCUMENTS, [5, 1000]), TOKENIZER, count):
        found.append(tokens)
        most = max(most, len(workers()))
    assert gathered(iter(found)) == expected(DOCUMENTS)
    assert (most, workers()) == (count if count > 1 else 0, [])


SCRIPT = """
import hashlib, itertools
from gpt2lab.data.records import Piece
from gpt2lab.data.tokenise import tokenise
from gpt2lab.tokenizer import Tokenizer
tokenizer = Tokenizer.from_json(open("tokenizer.json", encoding="utf-8").read())
text = open("text.txt", encoding="utf-8", newline="").read()
if __name__ == "__main__":
    digest = hashlib.sha256()
    for tokens in tokenise(itertools.repeat(Piece("text", text, True), 3), tokenizer, 2):
        digest.update(tokens.ids.tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.parametrize(
    "settings", [{"PYTHONHASHSEED": "7", "LC_ALL": "C"}, {"PYTHONUTF8": "0", "LANG": "tr_TR.ISO-8859-9"}]
)
def test_hash_seed_and_locale_change_nothing(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the user was imported')")
    (tmp_path / "text.txt").write_bytes(DOCUMENTS["long"].encode())
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json(), encoding="utf-8")
    elsewhere = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | settings,
    )  # fmt: skip
    here = np.array(expected(DOCUMENTS)["long"][0] * 3, np.int32)
    assert elsewhere.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest() and elsewhere.stderr == ""


def test_a_worker_needs_no_torch() -> None:
    code = "import sys, gpt2lab.data.tokenise; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "['numpy']\n"


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_an_unknown_character_is_named_with_its_document(count: int) -> None:
    characters = Tokenizer.chars(["abc"])
    for name, text, cause in (("two", "abx", "'x'"), ("th\udcffree", "a\udcff", r"'\udcff'")):
        source = [Piece("one", "abc", True), Piece(name, text, True)]
        with pytest.raises(DataError) as caught:
            list(tokenise(source, characters, count))
        assert caught.value.where == name and f"has never seen {cause}" in caught.value.cause
    assert not workers()


@pytest.mark.usefixtures("small_pieces")
def test_what_a_killed_worker_had_is_done_again() -> None:
    killed = 0

    def source() -> Iterator[Piece]:
        nonlocal killed
        for index, piece in enumerate(cut(DOCUMENTS, list(range(0, 4000, 100)))):
            if index in (10, 25):
                while not workers():
                    time.sleep(0.01)
                for worker in workers():
                    worker.send_signal(signal.SIGKILL)
                    killed += 1
            yield piece

    assert gathered(tokenise(source(), TOKENIZER, 2)) == expected(DOCUMENTS)
    assert killed >= 2 and not workers()


def test_workers_that_die_every_time_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ProcessError) as caught:
        list(tokenise(cut(DOCUMENTS, []), TOKENIZER, 2))
    assert "the process that tokenises long ended with code 1, 2 times in a row" in caught.value.cause


# --- The end ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_nothing_is_left_when_the_rest_is_not_wanted() -> None:
    read = 0

    def source() -> Iterator[Piece]:
        nonlocal read
        for index in range(100_000):
            read += 1
            yield Piece(str(index), STORY, last=True)

    found = tokenise(source(), TOKENIZER, 2)
    assert next(found).name == "0" and len(workers()) >= 1
    assert 5 < read < 100, "what is in flight has no bound"
    found.close()
    assert not workers()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_us(sent: signal.Signals, tmp_path: Path) -> None:
    code = SCRIPT.replace("True), 3)", "True))").replace(
        "digest.update(tokens.ids.tobytes())",
        "import psutil; print(*(child.pid for child in psutil.Process().children()), flush=True)",
    )
    code = code.replace(
        "    digest =", "    import sys; sys.excepthook = lambda *error: print(error[0].__name__, flush=True); digest ="
    )
    (tmp_path / "text.txt").write_bytes(DOCUMENTS["long"].encode())
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json(), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout and process.stderr
    pids: list[int] = []
    while len(pids) < 2:
        pids = [int(pid) for pid in process.stdout.readline().split()]
    os.killpg(process.pid, sent)
    said, complaints = process.communicate(timeout=60)
    assert complaints == "" and (sent == signal.SIGKILL or said.split()[-1] == "KeyboardInterrupt")
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline, f"{pids} are left"
        time.sleep(0.02)


def test_an_error_of_the_source_passes_through() -> None:
    def source() -> Iterator[Piece]:
        yield Piece("one", STORY, last=True)
        raise DataError("broken", cause="of its own", fix="none")

    for count in (1, 2):
        with pytest.raises(DataError, match="of its own"):
            list(tokenise(source(), TOKENIZER, count))
    assert not workers()
