"""The doctor finds what was planted, by comparison with all pairs of texts, and nothing where all is well."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from gpt2lab.config import DataConfig
from gpt2lab.data.doctor import inspect as module
from gpt2lab.data.doctor.advice import WIDTH, as_dict, describe, problems
from gpt2lab.data.doctor.inspect import Findings, inspect
from gpt2lab.data.prepare import prepare
from gpt2lab.data.prepared import Prepared, open_prepared
from gpt2lab.tokenizer import Tokenizer
from tests.data.doctor.test_scan import WORDS, write

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe([" ".join(WORDS * 20)], 300)
NONE = {"bytes_in": 0, "bytes_tokenised": 0, "bytes_skipped": 0, "skipped_by_reason": {}, "skipped": []}


def story(random: np.random.Generator, words: int = 60) -> str:
    return " ".join(f"{random.choice(WORDS[:6])}{random.integers(500)}" for _ in range(words))


def stories(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [story(random) for _ in range(count)]


def prepared(
    folder: Path, train: list[str], validation: list[str], tokenizer: Tokenizer = BYTES, **how: int
) -> Prepared:
    splits = [write(folder / name, texts, tokenizer, **how) for name, texts in (("t", train), ("v", validation))]
    return Prepared(folder, tokenizer, *splits, NONE)


def kinds(findings: Findings) -> list[str]:
    return [problem.kind for problem in problems(findings)]


def test_a_clean_text_has_no_problems(tmp_path: Path) -> None:
    findings = inspect(prepared(tmp_path, stories(30), stories(10, seed=1)))
    assert kinds(findings) == [] and describe(findings).startswith("No problems found.")
    assert all(copies.documents == 0 for kind in (findings.exact, findings.near) for copies in vars(kind).values())


# --- Copies ---------------------------------------------------------------------------------------------------------------


def touched(text: str) -> str:
    """Nearly the same text."""
    return text[:100] + "*" + text[101:]


def test_a_leak_is_named_first_with_its_documents_and_its_share(tmp_path: Path) -> None:
    train, validation = stories(30), stories(10, seed=1)
    validation[3], validation[7] = train[11], touched(train[5])
    findings = inspect(prepared(tmp_path, train, validation))
    assert kinds(findings) == ["leak", "leak"]
    for found, place, original in ((findings.exact, 3, 11), (findings.near, 7, 5)):
        (pair,) = found.leaked.pairs
        assert (found.leaked.documents, found.leaked.of_documents, found.leaked.share) == (1, 10, 0.1)
        assert found.leaked.tokens == len(validation[place].encode())
        assert (pair.copy.split, pair.copy.document, pair.original.split, pair.original.document) == (
            "validation", place, "train", original,
        )  # fmt: skip
        assert validation[place].startswith(pair.copy.text) and pair.copy.text
        assert pair.copy.start == sum(len(text.encode()) + 1 for text in validation[:place])
    said = describe(findings).splitlines()
    assert (
        said[0] == "2 problems"
        and "LEAK: 1 of 10 validation documents (10.0%" in said[1]
        and "validation 3 is equal to train 11" in said[2]
    )
    assert "similar by 0." in "\n".join(said[4:7]) and "to train 5" in "\n".join(said[4:7])


def test_copies_within_a_split_are_no_leak(tmp_path: Path) -> None:
    train, validation = stories(30), stories(10, seed=1)
    findings = inspect(
        prepared(tmp_path, [*train, train[4], train[4], *map(touched, train[9:14])], [*validation, validation[0]])
    )
    assert kinds(findings) == ["duplicates"] * 3
    assert [findings.exact.train.documents, findings.exact.validation.documents, findings.exact.leaked.documents] == [
        2,
        1,
        0,
    ]
    assert [(pair.copy.document, pair.original.document) for pair in findings.exact.train.pairs] == [(30, 4), (31, 4)]
    assert [(pair.copy.document, pair.original.document) for pair in findings.near.train.pairs] == [
        (32 + i, 9 + i) for i in np.argsort([-len(text.encode()) for text in train[9:14]], kind="stable")
    ]
    assert findings.near.validation.documents == findings.near.leaked.documents == 0


def jaccard(left: np.ndarray, right: np.ndarray, shingle: int) -> float:
    a, b = ({tuple(ids[i : i + shingle].tolist()) for i in range(len(ids) - shingle + 1)} for ids in (left, right))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_copies_are_those_of_all_pairs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Among texts that are clearly alike or clearly not."""
    random = np.random.default_rng(3)
    texts = stories(12)
    texts = [
        *texts,
        *(texts[i] for i in random.integers(0, 12, 8)),
        *(touched(texts[i]) for i in random.integers(0, 12, 12)),
    ]
    texts += [text[: len(text) // 2] for text in texts[:6]]
    random.shuffle(texts)
    train, validation = texts[:25], texts[25:]
    findings = inspect(prepared(tmp_path, train, validation, tokenizer))
    ids = [tokenizer.encode(text) for text in texts]
    alike = {(i, j): jaccard(ids[i], ids[j], findings.shingle) for i, j in itertools.combinations(range(len(texts)), 2)}
    assert (
        all(not 0.6 < value < 0.9 for value in alike.values()) and len({round(value) for value in alike.values()}) == 2
    )

    def expected(of: range, others: range, *, exact: bool) -> int:
        """Documents that have one before them, or in the training text, that is the same; or alike, where none is the same."""
        same = [any(texts[i] == texts[j] for j in others if j < i) for i in of]
        if exact:
            return sum(same)
        near = [any(alike[j, i] > 0.8 for j in others if j < i) for i in of]
        elsewhere = [texts[i] in train for i in of]  # a validation document that is a leak is not counted again
        return sum(a and not b and not (c and i >= 25) for a, b, c, i in zip(near, same, elsewhere, of, strict=True))

    first, second = range(25), range(25, len(texts))
    exact, near = findings.exact, findings.near
    assert exact.train.documents == expected(first, first, exact=True) > 0
    assert exact.validation.documents == expected(second, second, exact=True)
    assert exact.leaked.documents == expected(second, first, exact=True) > 0
    assert near.train.documents == expected(first, first, exact=False) > 0
    leaked = sum(
        text not in train and text not in validation[:i] and any(alike[j, 25 + i] > 0.8 for j in first)
        for i, text in enumerate(validation)
    )
    assert near.leaked.documents == leaked > 0


def test_near_copies_are_looked_for_in_a_sample_that_keeps_copies_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = stories(200)
    whole = prepared(tmp_path, [*texts, *map(touched, texts)], stories(5, seed=1))
    assert inspect(whole).looked_at == {"exact": 405, "near": 405} and "looked for" not in describe(inspect(whole))
    monkeypatch.setattr(module, "MOST_SIGNED", 120)
    findings = inspect(whole)
    assert 80 < findings.looked_at["near"] < 160 and findings.looked_at["exact"] == 405
    assert findings.near.train.share > 0.4  # it is a half of all, and would be a sixth if copies were drawn one by one
    assert f"near copies were looked for in {findings.looked_at['near']} of 405 documents" in describe(findings)


# --- Faults -----------------------------------------------------------------------------------------------------------------


def test_faults_are_problems_with_a_place(tmp_path: Path) -> None:
    train = stories(10)
    train[4] += " caf\ufffd"
    train[6] += "\0\0 and \x07"
    findings = inspect(prepared(tmp_path, train, [*stories(5, seed=1), "It\xe2\u20ac\u2122s"]))
    assert kinds(findings) == ["control", "nul", "replacement", "mojibake"]
    by_kind = {problem.kind: problem for problem in problems(findings)}
    assert "2, in 1 of 10 train documents" in by_kind["nul"].what and by_kind["nul"].where[0].startswith("train 6: ")
    assert "caf\ufffd" in by_kind["replacement"].where[0] and by_kind["replacement"].where[0].startswith("train 4: ")
    assert by_kind["mojibake"].where[0].startswith("validation 5: ")


def test_boilerplate_is_a_problem_when_there_is_much_of_it(tmp_path: Path) -> None:
    line = "\nAll rights reserved; no part of this may be reproduced."
    train = stories(60)
    some = inspect(
        prepared(tmp_path / "some", [*train[:49], *(text + line for text in train[49:])], stories(5, seed=1))
    )
    much = inspect(prepared(tmp_path / "much", [text + line for text in train], stories(5, seed=1)))
    assert some.splits["train"].repeated_lines == [(line.strip(), 11)] and kinds(some) == []
    assert much.splits["train"].repeated_bytes == 59 * len(line.strip()) and kinds(much) == ["boilerplate"]
    assert f"60 x {line.strip()!r}" in describe(much)


def test_damage_is_a_finding_and_no_crash(tmp_path: Path) -> None:
    whole = prepared(tmp_path, stories(30), stories(5, seed=1), block_bytes=1000)
    path = tmp_path / "t" / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[1024 + 2500] ^= 1
    path.write_bytes(content)
    broken = Prepared(tmp_path, BYTES, type(whole.train)([path]), whole.validation, NONE)
    findings = inspect(broken)
    assert kinds(findings)[0] == "damage" and findings.splits["train"].unread == 500
    assert "500 tokens of the train text cannot be read" in describe(findings) and str(path.name) in describe(findings)
    json.dumps(as_dict(findings))


def test_ids_of_another_vocabulary_are_a_finding(tmp_path: Path) -> None:
    other = prepared(tmp_path, stories(9), stories(5, seed=1), BPE)
    findings = inspect(Prepared(tmp_path, BYTES, other.train, other.validation, NONE))
    assert "vocabulary" in kinds(findings) and findings.beyond > 0
    describe(findings)


@pytest.mark.parametrize(("train", "validation"), [(["a" * 500], []), (["a" * 500], ["", ""]), ([], [])])
def test_a_split_too_short_for_a_sample_is_a_finding(train: list[str], validation: list[str], tmp_path: Path) -> None:
    findings = inspect(prepared(tmp_path, train, validation))
    assert kinds(findings) == ["short"] * (1 + (not train))
    describe(findings)
    json.dumps(as_dict(findings))


def test_counts_that_are_not_what_a_shard_says_are_a_finding(tmp_path: Path) -> None:
    whole = prepared(tmp_path, stories(9), stories(5, seed=1))
    object.__setattr__(whole.train.headers[0], "bytes", whole.train.bytes + 1)
    assert kinds(inspect(whole)) == ["counts"]


# --- What is said -----------------------------------------------------------------------------------------------------------


def test_json_has_what_prepare_says_and_what_was_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in stories(30)]
    lines[16] = '{"text": "cut'
    (tmp_path / "stories.jsonl").write_text("\n".join(lines))
    whole = prepare(DataConfig(source=str(tmp_path / "stories.jsonl")), "bytes", folder=tmp_path / "out")
    findings = inspect(open_prepared(tmp_path / "out"))
    said, summary = as_dict(findings), whole.summary()
    same = set(summary) - {"train", "validation", "example"}
    assert same > {"documents", "tokens", "bytes_in", "bytes_tokenised", "bytes_skipped", "skipped", "vocab_size"}
    assert {name: said[name] for name in same} == {name: summary[name] for name in same}
    assert all(said[split].items() >= summary[split].items() for split in ("train", "validation"))
    assert said["example"].startswith(summary["example"])
    assert json.loads(json.dumps(said))["problems"][0]["kind"] == "skipped" == kinds(findings)[0]
    assert "stories.jsonl line 17" in problems(findings)[0].where[0]
    bytes_in, tokenised, skipped = (f"{summary[name]:,}" for name in ("bytes_in", "bytes_tokenised", "bytes_skipped"))
    assert f"{bytes_in} bytes in = {tokenised} tokenised + {skipped} skipped" in describe(findings)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_figures_and_examples_are_of_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    train = [story(random, int(words)) for words in random.integers(1, 90, 50)]
    findings = inspect(prepared(tmp_path, train, stories(5, seed=1), tokenizer), seq_len=40)
    ids, split = [tokenizer.encode(text) for text in train], findings.splits["train"]
    lengths = sorted(map(len, ids))
    assert split.lengths == [lengths[0], lengths[4], lengths[24], lengths[44], lengths[49]]
    assert split.bytes == sum(len(text.encode()) for text in train) and split.tokens == sum(lengths) + 50
    used = len(set(np.concatenate(ids).tolist())) + 1
    assert findings.used == used and findings.unused
    assert [place.tokens for place in split.longest] == lengths[:-4:-1]
    assert split.examples[0].document == 0 and len({place.document for place in split.examples}) == 3
    assert all(train[place.document].startswith(place.text) and place.text for place in split.examples)
    stream = tokenizer.decode(findings.prepared.train.read(0, len(findings.prepared.train)))
    assert findings.sample in stream and len(tokenizer.encode(findings.sample.replace("<|endoftext|>", ""))) >= 25
    again, other = (inspect(findings.prepared, seq_len=40, seed=seed).sample for seed in (0, 1))
    assert again == findings.sample != other


def test_lines_fit_a_terminal(tmp_path: Path) -> None:
    train = [*stories(30), "\x07\ufffd" + "x" * 500, "\n".join(["long line " * 30] * 40)]
    train += [train[0], touched(train[1]) + "\n" * 50]
    findings = inspect(prepared(tmp_path, train, [*stories(5, seed=1), train[2]]))
    assert len(kinds(findings)) >= 5
    assert max(map(len, describe(findings).splitlines())) <= WIDTH
