"""A text is prepared once, whole or not at all, and a folder whose files do not belong together is refused."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.config import DataConfig
from gpt2lab.data import prepare as module
from gpt2lab.data import survey
from gpt2lab.data import text as text_module
from gpt2lab.data.prepare import parse_part, prepare, prepare_part
from gpt2lab.data.prepared import SUMMARY, Prepared, open_prepared
from gpt2lab.data.shard_writer import ShardWriter
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.tokenizer import Tokenizer
from tests.test_train import tree

TEXTS = ["First Citizen:\n", "é", "Before we proceed any further, hear me speak.", "\n\n", "All: Speak, speak."]


def write(folder: Path, texts: list[str] = TEXTS, tokenizer: Tokenizer | None = None) -> Prepared:
    """Prepared text with a short validation split."""
    source = Path("source")
    source.mkdir(exist_ok=True)
    for name, written in (("train", texts), ("validation", ["Speak."])):
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    config = DataConfig(source=str(source / "train.jsonl"), validation=str(source / "validation.jsonl"))
    return prepare(config, tokenizer or Tokenizer.bytes(), folder=folder)


# --- Files that do not belong together -----------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return write(tmp_path / "p").folder


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
        (Tokenizer, "encode"),
        (ShardWriter, "add"),
        (ShardWriter, "finish"),
        (Tokenizer, "save"),
        (module, "asdict"),
        (module, "put_in_place"),
        (Path, "rename"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_appears_whole_or_not_at_all(
    where: Any, name: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existing:
        write(tmp_path / "p", ["old text of some length"])
    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        with pytest.raises(Killed):
            write(tmp_path / "p")
    if existing:
        assert open_prepared(tmp_path / "p").train.read(0, 4).tolist() == list(b"old ")
    else:
        assert not (tmp_path / "p").exists()
    assert write(tmp_path / "p").train.read(0, 4).tolist() == list(b"Firs")
    assert {path.name for path in tmp_path.iterdir()} <= {"p", "cache", "here"}, "something is left"
    assert tree(tmp_path / "p") == tree(write(tmp_path / "other").folder)


def many(place: Path) -> DataConfig:
    """Twelve documents of 100 characters."""
    for number in range(12):
        (place / "many").mkdir(exist_ok=True)
        (place / "many" / f"{number}.txt").write_text(f"{number:02} " * 33 + "\n")
    return DataConfig(source=str(place / "many"))


def test_finished_shards_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source in ten shards; it dies in each of them."""
    monkeypatch.setattr(survey, "SHARD_CHARS", 100)
    config, made = many(tmp_path), list[str]()
    whole = tree(prepare(config, "bytes", folder=tmp_path / "whole").folder)
    finish = ShardWriter.finish

    def dying(writer: ShardWriter) -> Any:
        made.append(writer.path.name)
        if len(made) % 2 == 0:
            raise Killed
        return finish(writer)

    monkeypatch.setattr(ShardWriter, "finish", dying)
    deaths = 0
    while not (tmp_path / "p").exists():
        with suppress(Killed):
            prepare(config, "bytes", folder=tmp_path / "p")
            break
        deaths += 1
    assert deaths == 11 and len(made) == 12 + 11 and len([name for name in whole if name.endswith(".bin")]) == 12
    assert tree(tmp_path / "p") == whole


def test_a_damaged_shard_of_a_preparation_that_died_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "SHARD_CHARS", 100)
    config = many(tmp_path)
    whole = tree(prepare(config, "bytes", folder=tmp_path / "whole").folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "asdict", killed)
        with pytest.raises(Killed):
            prepare(config, "bytes", folder=tmp_path / "p")
    shard = tmp_path / "p.part" / "train-00003.bin"
    content = bytearray(shard.read_bytes())
    content[-50] ^= 1
    shard.write_bytes(content)
    prepare(config, "bytes", folder=tmp_path / "p")
    assert tree(tmp_path / "p") == whole


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2]])
def test_parts_are_the_same_shards(order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SHARD_CHARS", 250)
    config = many(tmp_path)
    whole = prepare(config, "bpe:270", folder=tmp_path / "whole")
    for part in order[:-1]:
        assert prepare_part(config, "bpe:270", tmp_path / "p", (part, 3)) is None and not (tmp_path / "p").exists()
    with pytest.raises(DataError, match="parts differ"):
        prepare_part(config, "bytes", tmp_path / "p", (order[-1], 3))
    done = prepare_part(config, "bpe:270", tmp_path / "p", (order[-1], 3))
    assert done is not None and tree(done.folder) == tree(whole.folder)
    assert not (tmp_path / "p.part").exists()


@pytest.mark.parametrize("name", ["Shards", "asdict", "put_in_place"])
def test_two_parts_may_both_be_the_last(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine closes the folder while this one is about to."""
    config = many(tmp_path)
    whole = prepare(config, "bytes", folder=tmp_path / "whole").folder
    assert prepare_part(config, "bytes", tmp_path / "p", (1, 2)) is None
    original = getattr(module, name)

    def meanwhile(*given: Any) -> Any:
        if (tmp_path / "p.part").exists():
            shutil.rmtree(tmp_path / "p.part")
            shutil.copytree(whole, tmp_path / "p")
        return original(*given)

    monkeypatch.setattr(module, name, meanwhile)
    done = prepare_part(config, "bytes", tmp_path / "p", (2, 2))
    assert done is not None and tree(done.folder) == tree(whole) and not (tmp_path / "p.part").exists()


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/99999"])
def test_a_part_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="bad part"):
        parse_part(text)


def test_the_names_of_files_decide_nothing_but_their_order(tmp_path: Path) -> None:
    one = prepare(many(tmp_path), "bytes", folder=tmp_path / "one")
    (tmp_path / "many").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        path.rename(path.with_name(f"x{path.stem}.md"))
    other = prepare(DataConfig(source=str(tmp_path / "moved")), "bytes", folder=tmp_path / "other")
    assert tree(one.folder) == tree(other.folder)


def test_a_source_that_changes_between_its_two_readings_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is new then is in neither: which files there are is looked up once."""
    for change in ("longer", "shorter", "one less", "another"):
        config, divide = many(tmp_path), text_module.divide

        def meanwhile(*found: Any, change: str = change, divide: Any = divide) -> Any:
            path = tmp_path / "many" / "7.txt"
            match change:
                case "longer":
                    path.write_text(path.read_text() + "more")
                case "shorter":
                    path.write_text(path.read_text()[:-4])
                case "one less":
                    path.unlink()
                case "another":
                    path.write_text(path.read_text().replace("07 07 0", "\u00e97 \u00e97 0"))
            return divide(*found)

        with monkeypatch.context() as patch:
            patch.setattr(text_module, "divide", meanwhile)
            with pytest.raises(DataError, match="the text changed" if change != "one less" else "cannot read the text"):
                prepare(config, "bytes", folder=tmp_path / "p")
        shutil.rmtree(tmp_path / "many")
    whole = tree(prepare(many(tmp_path), "bytes", folder=tmp_path / "whole").folder)
    assert tree(prepare(many(tmp_path), "bytes", folder=tmp_path / "p").folder) == whole  # nothing of it was kept


def test_a_folder_that_only_has_the_name_of_an_unfinished_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p.part").mkdir()
    (tmp_path / "p.part" / "letter.txt").write_text("Dear")
    with pytest.raises(DataError, match=r"will not overwrite .*p\.part"):
        write(tmp_path / "p")
    assert (tmp_path / "p.part" / "letter.txt").read_text() == "Dear"


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
        patch.setattr(module, "write_shards", killed)
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
