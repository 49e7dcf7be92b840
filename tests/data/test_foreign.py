"""Token files of nanoGPT and llm.c, written here as their own scripts write them."""

import array
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.config import DataConfig
from gpt2lab.data.foreign import open_foreign, token_bytes
from gpt2lab.data.prepare import prepare
from gpt2lab.data.shard_writer import ShardWriter
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.recipe import load_config
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.tracking import Console
from gpt2lab.train import train
from tests.forked import fork_command

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


# --- As a source ------------------------------------------------------------------------------------------------------


LONG = TEXTS * 20


def lengths(config: DataConfig) -> tuple[int, int]:
    prepared = prepare(config, "bytes")
    return len(prepared.train), len(prepared.validation)


def test_files_are_found_by_their_names(tmp_path: Path) -> None:
    """Each split has another length, so that a mistake shows."""
    ids = documents(LONG, separator_first=True)
    for folder in ("nanogpt", "llmc", "one"):
        (tmp_path / folder).mkdir()
    nanogpt(tmp_path / "nanogpt" / "train.bin", ids[:5000])
    nanogpt(tmp_path / "nanogpt" / "val.bin", ids[:300])
    (tmp_path / "nanogpt" / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    for name, size in (("fineweb_train_000002", 700), ("fineweb_train_000001", 2000), ("fineweb_val_000000", 400)):
        llmc(tmp_path / "llmc" / f"{name}.bin", ids[:size])
    llmc(tmp_path / "one" / "tiny_shakespeare_train.bin", ids[:1005])
    by_name = {
        "nanogpt": (5000, 300),
        "nanogpt/*.bin": (5000, 300),
        "nanogpt/train.bin": (4500, 500),
        "llmc": (2700, 400),
        "llmc/*_train_*.bin": (2430, 270),
        "one": (904, 101),
    }
    for source, expected in by_name.items():
        assert lengths(DataConfig(source=str(tmp_path / source))) == expected
    both = DataConfig(source=str(tmp_path / "llmc"), validation=str(tmp_path / "nanogpt" / "val.bin"))
    assert lengths(both) == (2700, 300)
    in_order = prepare(DataConfig(source=str(tmp_path / "llmc")), "bytes").train
    assert in_order.read(0, 2700).tolist() == ids[:2000] + ids[:700] != ids[:700] + ids[:2000]
    assert not (tmp_path / "here" / "pickled").exists()


@pytest.mark.parametrize("written", [nanogpt, llmc])
def test_the_last_tenth_is_held_out(written: Callable[[Path, list[int]], Path], tmp_path: Path) -> None:
    ids = documents(LONG, separator_first=True)
    files = [
        written(tmp_path / f"{name}.bin", part) for name, part in (("a", ids[:11]), ("b", ids[11:-7]), ("c", ids[-7:]))
    ]
    prepared = prepare(DataConfig(source=str(tmp_path / "?.bin")), "bytes")
    cut = len(ids) * 9 // 10
    for split, expected in ((prepared.train, ids[:cut]), (prepared.validation, ids[cut:])):
        assert split.read(0, len(split)).tolist() == expected
        texts = b"".join(bytes(split.read(*span).tolist()) for span in split.document_spans(END))
        assert texts == bytes(i for i in expected if i != END) and split.bytes == len(texts)
    assert prepared.train.fingerprint != prepared.validation.fingerprint
    files[1].write_bytes(files[1].read_bytes()[:-2] + b"\0\0")
    with pytest.raises(DataError, match=r"b\.bin\): it was changed while it was in use"):
        prepared.validation.read(0, 1)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    ids = documents(LONG, separator_first=False)
    source = DataConfig(source=str(nanogpt(tmp_path / "train.bin", ids)))
    for tokenizer in (None, "chars", "bpe:300"):
        with pytest.raises(ConfigError, match=r"does not say what made it\. Fix: give --tokenizer=gpt2"):
            prepare(source, tokenizer)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="two kinds of text"):
        prepare(DataConfig(source=source.source, validation=str(tmp_path / "a.txt")), "bytes")
    with pytest.raises(DataError, match=r"already prepared .*: these are token files"):
        prepare(source, "bytes", folder=tmp_path / "p")
    (tmp_path / "text.bin").write_text("It is text, whatever its name is.\n" * 9)
    assert lengths(DataConfig(source=str(tmp_path / "text.bin"))) == (276, 32)


def test_a_recipe_trains_from_them_to_the_same_losses(tmp_path: Path) -> None:
    """nanoGPT's files, and shards of ours with the same ids; control: ids in another order."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LONG if text))
    ours = prepare(DataConfig(source=str(tmp_path / "a.jsonl")), "bytes", folder=tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "others").mkdir()
    for name, split in (("train", ours.train), ("val", ours.validation)):
        ids = split.read(0, len(split)).tolist()
        nanogpt(tmp_path / "theirs" / f"{name}.bin", ids)
        nanogpt(tmp_path / "others" / f"{name}.bin", ids[::-1])
    losses = {}
    for folder in ("ours", "theirs", "others"):
        recipe = {
            "data.source": str(tmp_path / folder), "tokenizer": "bytes", "out": str(tmp_path / f"run-{folder}"),
            "steps": 4, "seq_len": 16, "micro_batch": 2, "batch_tokens": 64, "validate_every": 2,
            "model.embed_dim": 16, "model.num_heads": 2, "model.num_layers": 1, "system.device": "cpu",
        }  # fmt: skip
        flags = [f"--{key}={value}" for key, value in recipe.items()]
        run = train(load_config([], flags), Console(quiet=True))
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses[folder] = [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows]
    assert losses["ours"] == losses["theirs"] != losses["others"]
    assert [step for step, *pair in losses["ours"] if None not in pair] == [2, 4]
    shared = [*flags, f"--data.source={tmp_path / 'theirs'}", f"--out={tmp_path / 'shared'}"]
    with fork_command(2, ["train", *shared], tmp_path) as ranks:  # the second one is told where they lie
        assert ranks.wait() == [0, 0], ranks.everything_said
