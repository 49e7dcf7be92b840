"""Token files of nanoGPT and llm.c, written here as their own scripts write them."""

import array
import hashlib
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.data.foreign import open_foreign, token_bytes
from gpt2lab.data.shard_writer import ShardWriter
from gpt2lab.errors import DataError
from gpt2lab.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
END = BYTES.end_of_text
TEXTS = ["First Citizen: é", "", "Speak, speak."] * 20


def documents(texts: list[str], *, separator_first: bool) -> list[int]:
    """The ids of texts as bytes, with a separator before or after each."""
    ids = []
    for text in texts:
        ids += [END, *text.encode()] if separator_first else [*text.encode(), END]
    return ids


def nanogpt(path: Path, ids: list[int]) -> Path:
    """nanoGPT's prepare.py ends in ``np.array(ids, dtype=np.uint16).tofile(path)``: the bare numbers."""
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    return path


def llmc(path: Path, ids: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """llm.c's: 256 numbers of 32 bits, of which three are used, then the ids."""
    head = array.array("i", [magic, version, len(ids) if count is None else count] + [0] * 253)
    path.write_bytes(head.tobytes() + array.array("H", ids).tobytes())
    return path


@given(st.lists(st.integers(0, END), min_size=1, max_size=300), st.integers(0, 300), st.sampled_from([nanogpt, llmc]))
def test_what_others_wrote_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], cut: int, written: Callable[[Path, list[int]], Path]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    marked = [0xFF & END, END, *ids]  # with bytes that are no text
    parts = [part for part in (marked[: cut + 2], marked[cut + 2 :]) if len(part) > 1]
    paths = [written(folder / f"{number}.bin", [0, *part]) for number, part in enumerate(parts)]
    shards = open_foreign(paths, BYTES)
    whole = [i for part in parts for i in (0, *part)]
    assert shards.read(0, len(shards)).tolist() == whole
    assert shards.read(1, len(whole) - 1).tolist() == whole[1:] != whole[:-1]


@pytest.mark.parametrize(("written", "separator_first"), [(nanogpt, False), (llmc, True)])
def test_documents_and_bytes_are_counted(
    written: Callable[[Path, list[int]], Path], separator_first: bool, tmp_path: Path
) -> None:
    ids = documents(TEXTS, separator_first=separator_first)
    shards = open_foreign([written(tmp_path / "a.bin", ids[:100]), written(tmp_path / "b.bin", ids[100:])], BYTES)
    assert (shards.documents, shards.bytes) == (len(TEXTS), len("".join(TEXTS).encode()))
    found = [bytes(shards.read(*span).tolist()).decode() for span in shards.document_spans(END)]
    assert found == TEXTS
    cut_off = ids[1:] if separator_first else ids[:-1]
    assert open_foreign([written(tmp_path / "c.bin", cut_off)], BYTES).documents == len(TEXTS)


def test_a_token_stands_for_its_bytes() -> None:
    text = "Speak, speak — naïve café 日本, speak. " * 30
    for tokenizer in (BYTES, Tokenizer.train_bpe([text], 300), Tokenizer.chars([text])):
        ids = tokenizer.encode(text)
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode()) != len(text)
        assert token_bytes(tokenizer)[tokenizer.end_of_text] == 0


@pytest.mark.parametrize("written", [nanogpt, llmc])
def test_the_fingerprint_is_of_the_ids_and_of_the_tokenizer(
    written: Callable[[Path, list[int]], Path], tmp_path: Path
) -> None:
    ids = (np.arange(100_000) % 250).tolist()
    first = open_foreign([written(tmp_path / "a.bin", ids)], BYTES).fingerprint
    assert open_foreign([written(tmp_path / "b.bin", ids)], BYTES).fingerprint == first
    others = {open_foreign([written(tmp_path / "b.bin", [*ids, END])], BYTES).fingerprint}
    for place in (0, -1):
        changed = list(ids)
        changed[place] ^= 1
        others.add(open_foreign([written(tmp_path / "b.bin", changed)], BYTES).fingerprint)
    others.add(open_foreign([tmp_path / "a.bin"], Tokenizer.train_bpe(TEXTS, 258)).fingerprint)
    assert len(others) == 4 and first not in others


def gpt2lab(path: Path, ids: list[int]) -> Path:
    with ShardWriter(path, BYTES) as writer:
        writer.add(np.array(ids), 0, documents=0)
        writer.finish()
    return path


def numpys(path: Path, ids: list[int]) -> Path:
    with path.open("wb") as file:
        np.save(file, np.array(ids, np.uint16))
    return path


def as_bytes(content: Callable[[list[int]], bytes]) -> Callable[[Path, list[int]], Path]:
    def write(path: Path, ids: list[int]) -> Path:
        path.write_bytes(content(ids))
        return path

    return write


REFUSED: dict[str, tuple[Callable[[Path, list[int]], Path], str]] = {
    "empty": (as_bytes(lambda ids: b""), "it is text, or empty"),
    "a text": (as_bytes(lambda ids: "Speak, spéak.\n".encode() * 9000), "it is text, or empty"),
    "a text in Latin-1": (as_bytes(lambda ids: "Speak, sp\xe9ak.".encode("latin-1") * 900), "it is text, or empty"),
    "a short text": (as_bytes(lambda ids: "spéak!".encode()[1:]), "it is text, or empty"),
    "a text cut inside a character": (
        as_bytes(lambda ids: b" " + "é".encode() * 40_000 + b"."),
        "it is text, or empty",
    ),
    "an odd number of bytes": (as_bytes(lambda ids: struct.pack("<3H", 1, 2, 256) + b"\0"), "7 bytes, an odd number"),
    "uint32": (as_bytes(lambda ids: struct.pack(f"<{len(ids)}I", *ids)), "every second id is 0, as in uint32"),
    "ours": (gpt2lab, "it is one of our shards, or NumPy's"),
    "NumPy's": (numpys, "it is one of our shards, or NumPy's"),
    "of a larger vocabulary": (lambda path, ids: nanogpt(path, [*ids, 257]), "byte 1320.*beyond the vocabulary.* 257"),
    "llm.c's, of a larger vocabulary": (lambda path, ids: llmc(path, [*ids, 257]), "byte 2344.*beyond the vocabulary"),
    "Llama 3's": (lambda path, ids: llmc(path, ids, 20240801, 7), "Llama 3's tokens, version 7; GPT-2's in version 1"),
    "a later version": (lambda path, ids: llmc(path, ids, version=2), "a file of llm.c, version 2"),
    "fewer said": (lambda path, ids: llmc(path, ids, count=len(ids) - 1), "it has 2344 bytes, its header says 2342"),
    "more said": (lambda path, ids: llmc(path, ids, count=len(ids) + 1), "it has 2344 bytes, its header says 2346"),
    "minus one said": (lambda path, ids: llmc(path, ids, count=-1), "its header says 1022"),
}


@pytest.mark.parametrize(("written", "cause"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_file_of_tokens_is_refused(
    written: Callable[[Path, list[int]], Path], cause: str, tmp_path: Path
) -> None:
    ids = documents(TEXTS, separator_first=False)
    with pytest.raises(DataError, match=cause) as caught:
        open_foreign([written(tmp_path / "a.bin", ids)], BYTES)
    assert re.match(r"unusable tokens \(.*a\.bin, byte \d+\): ", str(caught.value))
    assert "remove" not in caught.value.fix  # it is not ours to remove


def test_files_of_two_formats_are_not_one_text(tmp_path: Path) -> None:
    ids = documents(TEXTS, separator_first=False)
    paths = [nanogpt(tmp_path / "a.bin", ids), llmc(tmp_path / "b.bin", ids)]
    with pytest.raises(DataError, match=r"b\.bin\): .*a\.bin and .*b\.bin are of two formats"):
        open_foreign(paths, BYTES)
    with pytest.raises(DataError, match=r"c\.bin\): No such file"):
        open_foreign([tmp_path / "c.bin"], BYTES)


@pytest.mark.parametrize("written", [nanogpt, llmc])
def test_ids_are_compared_with_the_vocabulary_where_they_are_read(
    written: Callable[[Path, list[int]], Path], tmp_path: Path
) -> None:
    """A file of three blocks, with a wrong id in the last."""
    ids = (np.arange(300_000) % 250).tolist()
    ids[299_000] = 300
    shards = open_foreign([written(tmp_path / "a.bin", ids)], BYTES)
    start = 1024 if written is llmc else 0
    assert shards.read(100, 200_000).tolist() == ids[100:200_100]
    with pytest.raises(DataError, match=f"byte {start + 2 * 299_000}"):
        shards.read(262_144, 1)
    assert [error.where for error in shards.damage()] == [f"{tmp_path / 'a.bin'}, byte {start + 2 * 299_000}"]


@pytest.mark.parametrize("change", ["another id", "touched", "removed"])
def test_a_file_that_changes_while_it_is_in_use_is_refused(change: str, tmp_path: Path) -> None:
    """Nobody has written down hashes, so that one that was only touched may have changed as well."""
    path = nanogpt(tmp_path / "a.bin", documents(TEXTS, separator_first=False))
    shards = open_foreign([path], BYTES)
    digest = hashlib.sha256(shards.read(0, len(shards)).tobytes()).hexdigest()
    if change == "another id":
        path.write_bytes(b"\1\0" + path.read_bytes()[2:])
    if change == "removed":
        path.unlink()
    else:
        os.utime(path, ns=(1, 1))
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.bin\): (it was changed while it was in use|No such file)"):
            shards.read(0, 3)
    again = nanogpt(tmp_path / "b.bin", documents(TEXTS, separator_first=False))
    shards = open_foreign([again], BYTES)
    assert hashlib.sha256(shards.read(0, len(shards)).tobytes()).hexdigest() == digest
