"""Tokens on disk: what is read is what was written, and a file that is not is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.config import DataConfig
from gpt2lab.data import shards as module
from gpt2lab.data.batches import Batches
from gpt2lab.data.shards import MAGIC, SUMMARY, Prepared, Shards, open_prepared, prepare, write_prepared
from gpt2lab.data.sources import Corpus, Document
from gpt2lab.errors import DataError
from gpt2lab.tokenizer import Tokenizer

TEXTS = ["First Citizen:\n", "é", "Before we proceed any further, hear me speak.", "\n\n", "All: Speak, speak."]


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"{i}.txt", text) for i, text in enumerate(texts)]


def write(folder: Path, texts: list[str] = TEXTS, tokenizer: Tokenizer | None = None) -> Prepared:
    """Prepared text with a short validation split, read back."""
    write_prepared(Corpus(documents(texts), documents(["Speak."])), tokenizer or Tokenizer.bytes(), folder)
    return open_prepared(folder)


def expected_ids(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    return [i for text in texts for i in [*tokenizer.encode(text).tolist(), tokenizer.end_of_text]]


# --- There and back ---------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8))
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    prepared = write(tmp_path_factory.mktemp("data") / "p", texts)
    ids = expected_ids(texts, Tokenizer.bytes())
    assert prepared.train.read(0, len(prepared.train)).tolist() == ids != expected_ids([*texts, "!"], Tokenizer.bytes())
    assert prepared.train.bytes == len("".join(texts).encode()) and prepared.train.documents == len(texts)
    assert prepared.validation.read(0, 7).tolist() == [*b"Speak.", 256]
    assert prepared.tokenizer.fingerprint == Tokenizer.bytes().fingerprint


def test_reading_gives_a_fresh_array_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    train = write(tmp_path / "p").train
    ids = train.read(3, 5)
    kept = ids.copy()
    ids[:] = 0
    assert ids.dtype == np.int64 and train.read(3, 5).tolist() == kept.tolist() != train.read(4, 5).tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_two_bytes_while_they_fit(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    text = "".join(chr(code) for code in range(2**17) if not 0xD800 <= code < 0xE000)[: vocab_size - 1]
    tokenizer = Tokenizer.chars([text, "Speak."])
    train = write(tmp_path / "p", [text], tokenizer).train
    assert (tokenizer.vocab_size, train.headers[0].dtype) == (vocab_size, dtype)
    assert train.read(0, vocab_size).tolist() == list(range(vocab_size))
    size = (tmp_path / "p" / "train-00000.bin").stat().st_size
    assert size - vocab_size * int(dtype[2]) in range(64, 1024) and (size - vocab_size * int(dtype[2])) % 64 == 0


def test_many_shards_are_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text * n for n, text in enumerate(TEXTS * 3)]
    one = write(tmp_path / "one", texts).train
    monkeypatch.setattr(module, "SHARD_TOKENS", 50)
    many = write(tmp_path / "many", texts).train
    longest = max(len(text.encode()) + 1 for text in texts)
    assert longest > 50 and len(one.headers) == 1 and len(many.headers) > 5
    assert all(header.tokens <= 50 or (header.tokens <= longest and header.documents == 1) for header in many.headers)
    assert (len(many), many.bytes, many.documents) == (len(one), one.bytes, one.documents)
    assert many.fingerprint != write(tmp_path / "other", texts[::-1]).train.fingerprint

    @given(st.tuples(st.integers(0, len(one)), st.integers(0, len(one))).map(sorted))
    def check(ends: list[int]) -> None:
        start, end = ends
        assert many.read(start, end - start).tolist() == one.read(start, end - start).tolist()

    check()
    places = [0, *accumulate(header.tokens for header in many.headers)]
    assert (
        many.read(places[1] - 2, 4).tolist()
        == one.read(places[1] - 2, 4).tolist()
        != one.read(places[1] - 1, 4).tolist()
    )
    samples = [
        Batches(shards, seq_len=30, step_samples=4, micro_batch=4, seed=0)(2, 0)[0].tolist() for shards in (one, many)
    ]
    assert samples[0] == samples[1]


def test_no_documents_are_an_empty_shard(tmp_path: Path) -> None:
    train = write(tmp_path / "p", []).train
    assert (len(train.headers), len(train), train.bytes, train.read(0, 0).tolist()) == (1, 0, 0, [])


# --- Files that lie ---------------------------------------------------------------------------------------------------


def header(**changes: Any) -> Callable[[bytes], bytes]:
    """A shard whose header says something else."""

    def lie(content: bytes) -> bytes:
        end = len(MAGIC) + 4 + int.from_bytes(content[len(MAGIC) : len(MAGIC) + 4], "little")
        said = json.dumps(json.loads(content[len(MAGIC) + 4 : end]) | changes).encode()
        return MAGIC + len(said).to_bytes(4, "little") + said + content[end:]

    return lie


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "only the magic number": lambda content: content[: len(MAGIC)],
    "another magic number": lambda content: b"gpt2lab\x02" + content[len(MAGIC) :],
    "of another program": lambda content: (20240520).to_bytes(4, "little") + content[4:],
    "an endless header": lambda content: MAGIC + b"\xff" * 4 + content[len(MAGIC) + 4 :],
    "a header that is not JSON": lambda content: content.replace(b'{"dtype"', b'["dtype"'),
    "half a file": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-1],
    "an id less": lambda content: content[:-2],
    "an id more": lambda content: content + b"\0\0",
    "fewer tokens said": header(tokens=3),
    "2**60 tokens said": header(tokens=2**60),
    "minus one token said": header(tokens=-1),
    "tokens as text": header(tokens="many"),
    "wider ids said": header(dtype="<u4"),
    "halves said": header(dtype="<f2"),
    "objects said": header(dtype="O"),
    "no type said": header(dtype="no such"),
    "another vocabulary said": header(vocab_size=3),
    "another tokenizer said": header(tokenizer="0" * 64),
    "another hash said": header(sha256="0" * 64),
    "more text said": header(bytes=10**6),
    "an unknown key": header(trust="me"),
    "brackets for a header": lambda content: MAGIC + (60_000).to_bytes(4, "little") + b"[" * 60_000,
    "another id": lambda content: content[:-4] + b"!\0" + content[-2:],
    "an id beyond the vocabulary": lambda content: content[:-1] + b"\xff",
}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return write(tmp_path / "p").folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_refused(damage: Callable[[bytes], bytes], prepared: Path) -> None:
    path = prepared / "train-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(DataError, match=r"train-00000\.bin") as caught:
        open_prepared(prepared)
    assert f"Fix: remove {prepared} and prepare the text again" in str(caught.value)
    path.write_bytes(header()(whole))
    assert open_prepared(prepared).train.read(0, 5).tolist() == list(b"First")


@pytest.mark.parametrize(("last", "refused"), [(255, False), (256, False), (257, True), (0xFFFF, True)])
def test_ids_beyond_the_vocabulary_are_refused_even_where_the_hash_fits(
    last: int, refused: bool, prepared: Path
) -> None:
    path, tokens = prepared / "train-00000.bin", len(open_prepared(prepared).train)
    content = path.read_bytes()[:-2] + last.to_bytes(2, "little")
    path.write_bytes(header(sha256=hashlib.sha256(content[-2 * tokens :]).hexdigest())(content))
    if refused:
        with pytest.raises(DataError, match="its ids are not the ones that were written"):
            Shards([path])
    else:
        assert Shards([path]).read(tokens - 1, 1).tolist() == [last]


def shard_missing(folder: Path) -> None:
    (folder / "validation-00000.bin").unlink()


def shards_swapped(folder: Path) -> None:
    (folder / "train-00000.bin").replace(folder / "validation-00000.bin")
    shutil.copy(folder / "validation-00000.bin", folder / "train-00000.bin")


def other_tokenizer(folder: Path) -> None:
    Tokenizer.chars(["abc"]).save(folder)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_summary(folder: Path) -> None:
    (folder / SUMMARY).unlink()


def half_a_summary(folder: Path) -> None:
    (folder / SUMMARY).write_text((folder / SUMMARY).read_text()[:20])


@pytest.mark.parametrize(
    "damage", [shard_missing, shards_swapped, other_tokenizer, no_tokenizer, no_summary, half_a_summary]
)
def test_a_folder_whose_files_do_not_belong_together_is_refused(damage: Callable[[Path], None], prepared: Path) -> None:
    damage(prepared)
    with pytest.raises(DataError, match="Fix: "):
        open_prepared(prepared)


@pytest.mark.parametrize("summary", ["[]", "{}", "3", '{"train": 5, "validation": []}', "[" * 100_000])
def test_a_summary_that_is_something_else_is_refused(summary: str, prepared: Path) -> None:
    (prepared / SUMMARY).write_text(summary)
    with pytest.raises(DataError, match=r"damaged shard \(.*prepared\.json\)"):
        open_prepared(prepared)


# --- Whole or not at all ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Whatever ends the process at this line."""


def killed(*args: Any, **kwargs: Any) -> Any:
    raise Killed


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (Tokenizer, "encode_documents"),
        (module, "_shard_path"),
        (Tokenizer, "save"),
        (module, "asdict"),
        (Path, "rename"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_appears_whole_or_not_at_all(
    where: Any, name: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existing:
        write(tmp_path / "p", ["old"])
    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        with pytest.raises(Killed):
            write_prepared(Corpus(documents(TEXTS), documents(["Speak."])), Tokenizer.bytes(), tmp_path / "p")
    assert [path.name for path in tmp_path.glob("p*")] in (["p"], []) and not list(tmp_path.glob("*.part"))
    if (tmp_path / "p").exists():
        assert existing and open_prepared(tmp_path / "p").train.read(0, 4).tolist() == [*b"old", 256]
    assert write(tmp_path / "p").train.read(0, 4).tolist() == list(b"Firs")


def test_what_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine")
    (tmp_path / "yours").mkdir()
    (tmp_path / "yours" / "letter.txt").write_text("Dear")
    for taken in (tmp_path / "yours", tmp_path / "yours" / "letter.txt"):
        with pytest.raises(DataError, match="it is there, and holds no shards"):
            write(taken)
    assert [path.name for path in (tmp_path / "yours").iterdir()] == ["letter.txt"]
    assert (tmp_path / "yours" / "letter.txt").read_text() == "Dear"


# --- prepare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat\n" * 20)
    return DataConfig(source=str(path))


def test_a_text_is_tokenised_once(source: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(source, "bytes")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_prepared", killed)
        assert prepare(source, Tokenizer.bytes()).folder == first.folder
        for config, tokenizer in (
            (source, "chars"),
            (DataConfig(source=source.source, validation=source.source), "bytes"),
        ):
            with pytest.raises(Killed):
                prepare(config, tokenizer)
    Path(source.source).write_text("the cat sat on the hat\n" * 20)
    second = prepare(source, "bytes")
    assert second.folder != first.folder and second.train.fingerprint != first.train.fingerprint
    assert b"hat" in bytes(second.train.read(0, 40).tolist())


def test_byte_pairs_are_learned_from_the_training_text_alone_but_characters_from_both(source: DataConfig) -> None:
    text = "a cat sat here\n" * 27 + "all dogs bark\n" * 2
    Path(source.source).write_text(text)
    head = text[: len(text) * 9 // 10]
    made = prepare(source, "bpe:270").tokenizer
    assert (
        made.fingerprint == Tokenizer.train_bpe([head], 270).fingerprint != Tokenizer.train_bpe([text], 270).fingerprint
    )
    prepared = prepare(source, "chars")
    assert prepared.tokenizer.fingerprint == Tokenizer.chars([text]).fingerprint != Tokenizer.chars([head]).fingerprint
    assert "all dogs bark" in prepared.tokenizer.decode(prepared.validation.read(0, len(prepared.validation)))


def test_prepared_text_is_a_source(source: DataConfig, tmp_path: Path) -> None:
    made = prepare(source, "chars", folder=tmp_path / "prepared")
    again = prepare(DataConfig(source=str(tmp_path / "prepared")), made.tokenizer)
    assert again.folder == tmp_path / "prepared" and again.train.fingerprint == made.train.fingerprint
    assert prepare(source, "bytes").train.fingerprint != made.train.fingerprint


@pytest.mark.parametrize(
    "named",
    [
        "bytes",
        Tokenizer.bytes(),
        Tokenizer.chars(["abc"]),
        "bpe:270",
    ],
    ids=["bytes", "a tokenizer of bytes", "of other characters", "bpe:270"],
)
def test_prepared_text_of_another_tokenizer_is_refused(
    named: str | Tokenizer, source: DataConfig, tmp_path: Path
) -> None:
    made = prepare(source, "chars", folder=tmp_path / "prepared")
    again = DataConfig(source=str(tmp_path / "prepared"))
    for same in (None, "chars", made.tokenizer):
        assert prepare(again, same).tokenizer.fingerprint == made.tokenizer.fingerprint
    with pytest.raises(DataError, match="made with another tokenizer, of 12 tokens"):
        prepare(again, named)


def test_the_summary_counts_what_is_in_the_files(source: DataConfig) -> None:
    summary = prepare(source, "bytes").summary()
    text = Path(source.source).read_text()
    assert (summary["documents"], summary["bytes_in"], summary["tokens"]) == (2, len(text), len(text) + 2)
    assert (summary["train"]["bytes"], summary["validation"]["bytes"]) == (len(text) * 9 // 10, len(text) // 10)
    assert (summary["vocab_size"], summary["example"]) == (257, text[:32])


def test_shards_alone_open_in_the_order_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "p").folder
    paths = [folder / "validation-00000.bin", folder / "train-00000.bin"]
    assert Shards(paths).read(0, 9).tolist() == [*b"Speak.", 256, *b"Fi"] != Shards(paths[::-1]).read(0, 9).tolist()
