"""A stream is one endless text: the same from any place on, in blocks of which a few are at hand, whoever dies meanwhile."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab import tokenizer
from gpt2lab.config import DataConfig
from gpt2lab.data import tokenise
from gpt2lab.data.sources import source_files
from gpt2lab.data.stream import window as windows
from gpt2lab.data.stream.blocks import Journal, write_blocks
from gpt2lab.data.stream.held_out import BEGINNING, HeldOut
from gpt2lab.data.stream.reading import Account, Endless, Place, file_order
from gpt2lab.data.stream.samples import Streamed
from gpt2lab.data.stream.text import StreamedText, open_stream
from gpt2lab.data.stream.window import ATTEMPTS, BEHIND, Bringer, Window
from gpt2lab.data.survey import survey
from gpt2lab.errors import ConfigError, DataError, ProcessError
from gpt2lab.seeds import derive
from gpt2lab.tokenizer import Tokenizer
from tests.forked import none_left, wait_until

BYTES = Tokenizer.bytes()
LENGTH = 64
SEED = 5


@pytest.fixture(autouse=True)
def _read_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """These texts are short: else the tokenizer would be given hundreds of epochs at once."""
    monkeypatch.setattr(tokenise, "_BATCH", 500)


def write_source(folder: Path) -> Path:
    """Files of several kinds, with documents of several lengths, prompts, an empty document, and letters of several bytes."""
    random = Random(3)
    folder.mkdir()
    for name in ("a.txt", "b.md"):
        (folder / name).write_text("".join(random.choice("a b\u00e4\u2603\n") for _ in range(700)), encoding="utf-8")
    rows = [{"text": f"document {n} " * n} for n in range(12)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"{n} plus {n}?", "response": f"That is {2 * n}."} for n in range(9)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "e.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("stream") / "source")


def documents_of(source: Path, name: str) -> Iterator[list[tuple[str, bool]]]:
    """The parts of each document of a file, read as plainly as can be, and whether they are learned."""
    content = (source / name).read_text(encoding="utf-8")
    if not name.endswith("jsonl"):
        yield [(content, True)]
        return
    for row in map(json.loads, content.splitlines()):
        yield [(row["text"], True)] if "text" in row else [(row["prompt"] + "\n", False), (row["response"], True)]


def naive(source: Path, epochs: int, seed: int = SEED) -> tuple[list[int], list[bool]]:
    """All ids of some epochs, one after the other, and which of them are learned."""
    names = sorted(path.name for path in source.iterdir())
    ids, scored = list[int](), list[bool]()
    for epoch in range(epochs):
        for number in np.random.default_rng(derive(seed, "files", epoch)).permutation(len(names)):
            for document in documents_of(source, names[number]):
                if any(text for text, _ in document):
                    for text, learned in document:
                        ids += text.encode()
                        scored += [learned] * len(text.encode())
                    ids, scored = [*ids, 256], [*scored, document[-1][1]]
    return ids, scored


def endless(source: Path, **changes: Any) -> Endless:
    return Endless(source_files(str(source)), SEED, HeldOut(), **changes)


def take(source: Path, start: Place, count: int) -> list[int]:
    """So many ids from a place on."""
    ids = list[int]()
    for _, part in endless(source).tokens(start, BYTES):
        ids += part.ids.tolist()
        if len(ids) >= count:
            return ids[:count]
    return ids


# --- The text ---------------------------------------------------------------------------------------------------------


def test_the_endless_text_is_all_files_in_the_order_of_each_epoch(source: Path) -> None:
    ids, scored = naive(source, 3)
    found, learned, epochs = list[int](), list[bool](), set[int]()
    for place, part in endless(source).tokens(Place(), BYTES):
        if len(found) >= len(ids):
            break
        found += part.ids.tolist()
        learned += [part.scored] * len(part.ids)
        epochs.add(place.epoch)
    assert found[: len(ids)] == ids and learned[: len(ids)] == scored and not all(scored)
    assert {0, 1, 2} <= epochs
    orders = {tuple(file_order(SEED, epoch, 5)) for epoch in range(6)}
    assert len(orders) > 3 and all(sorted(order) == list(range(5)) for order in orders)


def test_from_any_place_on_it_is_the_same(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are short, so that places lie inside documents."""
    monkeypatch.setattr(tokenizer, "_PIECE", 40)
    ids, _ = naive(source, 3)
    places = list[Place]()
    for place, part in endless(source).tokens(Place(), BYTES):
        if len(places) >= 2 * len(ids) // 3:
            break
        places += [replace(place, ids=place.ids + n) for n in range(len(part.ids))]
    assert any(place.byte for place in places) and any(place.epoch for place in places)

    @given(st.integers(0, len(places) - 1))
    def check(at: int) -> None:
        assert take(source, places[at], 80) == ids[at : at + 80]

    check()
    assert take(source, places[7], 80) != ids[8:88]


def test_each_file_has_an_account_of_all_its_bytes(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.txt").write_bytes(b"good\n" * 30 + b"\xff\xfe\xfd\n" + b"good\n" * 30)
    (bad / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"\n{"text": "three"}\n')
    for folder in (source, bad):
        accounts = list[Account]()
        stream = endless(folder, on_file=accounts.append).tokens(Place(), BYTES)
        while len(accounts) < 2 * len(list(folder.iterdir())):
            next(stream)
        accounts = accounts[: len(list(folder.iterdir()))]
        for account in accounts:
            whole = survey(next(f for f in source_files(str(folder)) if f.name == account.file).read())
            assert account.bytes_in == whole.bytes_in == (folder / account.file).stat().st_size
            assert account.bytes_tokenised == whole.bytes and account.bytes_held_out == 0
            assert account.skipped_by_reason == whole.skipped_bytes
    found = sorted(row["where"] for account in accounts for row in account.skipped if row["fault"])
    assert found == ["line 2", "line 31"]
    with pytest.raises(DataError, match=r"unusable text \((a\.txt, line 31|b\.jsonl, line 2)\)"):
        list(islice(endless(bad, on_fault="stop").tokens(Place(), BYTES), 20))


def test_too_many_faults_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n" * 20_000)
    with pytest.raises(DataError, match=r"not text \(a\.txt, lines 1 to .*a tenth of the text"):
        list(islice(endless(tmp_path).tokens(Place(), BYTES), 20))


@pytest.mark.parametrize("content", ["", "held out"])
def test_a_source_with_nothing_to_learn_does_not_go_on_for_ever(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    held_out = HeldOut({hashlib.sha256(content.encode()).hexdigest(): 100})
    with pytest.raises(DataError, match="too little text to stream"):
        next(Endless(source_files(str(tmp_path)), SEED, held_out).tokens(Place(), BYTES))


# --- Held out ---------------------------------------------------------------------------------------------------------


def test_what_is_held_out_is_not_learned_from_wherever_it_comes_again(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    long = "long " * BEGINNING
    for name, texts in {
        "a": ["first", "second", long, "third"],
        "b": ["other", "second", long + "end", "third"],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(source=str(folder), stream=True, validation_tokens=500)
    stream = open_stream(config, BYTES)
    validation = stream.tokenizer.decode(stream.validation.read(0, len(stream.validation)))
    cut = 4 * 500 - len("firstsecond")
    assert validation == "first<|endoftext|>second<|endoftext|>" + long[:cut] + "<|endoftext|>"
    text = Endless(source_files(str(folder)), SEED, HeldOut.load(stream.folder))
    ids = np.concatenate([part.ids for _, part in islice(text.tokens(Place(), BYTES), 5)])
    learned = sorted(BYTES.decode(ids).split("<|endoftext|>")[:-1])
    assert learned == sorted([long[cut:], "third", "other", long[cut:] + "end", "third"])
    assert (
        open_stream(config, BYTES).folder
        == stream.folder
        != open_stream(replace(config, fields=("text",)), BYTES).folder
    )


def test_a_validation_text_of_its_own_is_held_out_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to learn")
    (tmp_path / "v.txt").write_text("to validate")
    stream = open_stream(
        DataConfig(source=str(tmp_path / "a.txt"), validation=str(tmp_path / "v.txt"), stream=True), BYTES
    )
    assert BYTES.decode(stream.validation.read(0, len(stream.validation))) == "to validate<|endoftext|>"


def test_a_tokenizer_that_is_made_from_the_text_is_refused(source: Path) -> None:
    for name in ("chars", "bpe:300"):
        with pytest.raises(ConfigError, match=r"gpt2lab tokenizer train"):
            open_stream(DataConfig(source=str(source), stream=True), name)


# --- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_blocks_are_cut_from_the_text_and_share_one_id(source: Path, tmp_path: Path, length: int) -> None:
    ids, scored = naive(source, 3)
    text = endless(source)
    blocks = write_blocks(text.tokens(Place(), BYTES), BYTES, tmp_path, length, 0, lambda p: text.file_at(p).name, id)
    for number, block in enumerate(islice(blocks, 12 if length < 1000 else 4)):
        shard = Window(tmp_path).block(number)
        start = number * length
        assert shard.read(0, length + 1).tolist() == ids[start : start + length + 1] and len(shard) == length + 1
        assert shard.scored(0, length + 1).tolist() == scored[start : start + length + 1]
        assert take(source, block.next, 50) == ids[start + length : start + length + 50]
        assert shard.headers[0].sha256 == block.sha256


# --- A window ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StreamedText:
    monkeypatch.setenv("GPT2LAB_CACHE", str(tmp_path / "cache"))
    return open_stream(DataConfig(source=str(source), stream=True, validation_tokens=10), BYTES)


@pytest.fixture
def bringers(text: StreamedText, tmp_path: Path) -> Iterator[Any]:
    """Makes bringers of the stream, and ends them."""
    made = list[Bringer]()

    def make(place: str = "blocks", journal: str = "stream.jsonl", length: int = LENGTH) -> Bringer:
        made.append(Bringer(tmp_path / place, text.job(SEED, length), Journal(tmp_path / journal)))
        return made[-1]

    yield make
    for bringer in made:
        bringer.close()


def await_block(window: Window, number: int) -> np.ndarray:
    assert wait_until(lambda: window.has(number), 30)
    return window.block(number).read(0, LENGTH + 1)


def test_a_few_blocks_are_at_hand_and_others_see_them(bringers: Any, tmp_path: Path) -> None:
    bringer = bringers()
    other = Window(bringer.folder)
    assert not other.has(0)
    for number in range(12):
        ids = await_block(bringer, number)
        assert other.has(number) and (await_block(other, number) == ids).all()
        names = [path.name for path in bringer.folder.glob("block-*.bin")]
        assert len(names) <= BEHIND + 2 and other.has(max(0, number - BEHIND))
    assert wait_until(lambda: 11 in Journal(tmp_path / "stream.jsonl").blocks, 10)
    assert sorted(Journal(tmp_path / "stream.jsonl").blocks)[:12] == list(range(12))
    assert bringer.where(0).startswith("in ") and bringer.where(0).endswith(" of 5)")


def test_blocks_are_made_again_to_the_bit_from_the_journal_or_without_it(bringers: Any, tmp_path: Path) -> None:
    first = bringers()
    made = [await_block(first, number) for number in range(9)]
    first.close()
    for again in (bringers(), bringers(place="elsewhere"), bringers(place="new", journal="none.jsonl")):
        for number in (5, 6, 8):
            assert (await_block(again, number) == made[number]).all()
        again.close()
    assert not (made[5] == made[6]).all()


def test_a_killed_producer_is_started_again(bringers: Any) -> None:
    bringer = bringers()
    calm = bringers(place="calm", journal="calm.jsonl")
    for number in range(0, 12, 2):
        ids = await_block(bringer, number)
        os.kill(bringer._process.pid, signal.SIGKILL)
        assert (await_block(calm, number) == ids).all()
    assert (await_block(bringer, 13) == await_block(calm, 13)).all()


def test_a_producer_that_dies_again_and_again_is_given_up(bringers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows.sys, "executable", "/bin/false")
    bringer = bringers()
    with pytest.raises(ProcessError, match=f"ended with code 1, {ATTEMPTS} times in a row"):
        wait_until(lambda: bringer.has(0), 30)
    with pytest.raises(ProcessError, match="times in a row"):
        Window(bringer.folder).has(0)


def test_the_producer_ends_with_its_parent(text: StreamedText, tmp_path: Path) -> None:
    bringer = Bringer(tmp_path / "blocks", text.job(SEED, LENGTH), Journal(None))
    await_block(bringer, 0)
    left = [
        bringer._process.pid,
        *(child.pid for child in psutil.Process(bringer._process.pid).children(recursive=True)),
    ]
    bringer.close()  # its standard input ends, as it does when a parent is killed
    assert none_left(left, 10)


def test_a_source_that_changed_is_named(source: Path, text: StreamedText, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other")
    text = replace(text, config=replace(text.config, source=str(other)))
    good = Bringer(tmp_path / "good", text.job(SEED, LENGTH), Journal(tmp_path / "stream.jsonl"))
    await_block(good, 6)
    good.close()
    (other / "a.txt").write_text("short")
    bad = Bringer(tmp_path / "bad", text.job(SEED, LENGTH), Journal(tmp_path / "stream.jsonl"))
    with pytest.raises(DataError, match=r"the source changed .*a\.txt was .* and is "):
        wait_until(lambda: bad.has(6), 30)
    bad.close()


def test_blocks_that_are_not_what_was_learned_from_are_refused(bringers: Any, tmp_path: Path) -> None:
    first = bringers()
    await_block(first, 4)
    first.close()
    journal = tmp_path / "stream.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in rows:
        if row.get("number") == 3:
            row["sha256"] = "0" * 64
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = bringers(place="again")
    with pytest.raises(
        DataError, match=r"the source changed \(data.source\): block 3, from .*, is not what was learned"
    ):
        wait_until(lambda: again.has(3), 30)


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_text_each_once_and_shuffled_in_their_block(source: Path, bringers: Any) -> None:
    seq_len, per_block = 8, LENGTH // 8
    ids = np.array(_without_held_out(source))
    samples = Streamed(bringers(), seq_len, per_block, SEED)
    drawn = list[int]()
    for index in range(6 * per_block):
        assert wait_until(lambda index=index: samples.window.has(samples.block(index)), 30)
        start = samples.start(index)
        assert (samples.read(index) == ids[start : start + seq_len + 1]).all() and samples.scored(index).shape == (
            seq_len,
        )
        drawn.append(start)
    blocks = [drawn[n * per_block : (n + 1) * per_block] for n in range(6)]
    assert sorted(drawn) == list(range(0, 6 * LENGTH, seq_len))
    assert all(max(block) < min(later) for block, later in pairwise(blocks))
    assert len({tuple(np.array(block) - min(block)) for block in blocks}) == 6
    other = Streamed(samples.window, seq_len, per_block, SEED + 1)
    assert [other.start(index) for index in range(per_block)] != blocks[0]


def _without_held_out(source: Path) -> list[int]:
    """The text without its first forty characters, which are those of a.txt."""
    ids, _ = naive(source, 2)
    first = (source / "a.txt").read_text(encoding="utf-8")
    whole, rest = [*first.encode(), 256], [*first[40:].encode(), 256]
    text = bytes(min(id, 255) for id in ids)
    at = text.index(bytes(min(id, 255) for id in whole))
    return ids[:at] + rest + ids[at + len(whole) :]
