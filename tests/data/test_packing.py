"""Whole documents in samples: every id once an epoch, no document cut that fits, little room left; training as by hand."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.config import DataConfig, GPT2Config, RunConfig
from gpt2lab.data import packing
from gpt2lab.data.batches import Batches
from gpt2lab.data.packing import Documents, best_fit, document_spans, make_samples
from gpt2lab.data.samples import Contiguous
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.evaluate.tasks import evaluate
from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.loss import IGNORE
from gpt2lab.recipe import load_config
from gpt2lab.seeds import generator_for
from gpt2lab.settle import settle
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.tracking import Console, read_rows
from gpt2lab.train import train
from gpt2lab.weights import open_model
from tests.data.test_prompts import INSTRUCTIONS, SETTINGS, prepared
from tests.forked import fork_command
from tests.reference import documents_of
from tests.test_train import Witness, flags

END = 0


class Text:
    """Documents of numbers that never come twice, each closed by END; a `cut` text lacks the last END."""

    def __init__(self, lengths: list[int], *, cut: bool = False, prompts: frozenset[int] = frozenset()) -> None:
        ends = np.cumsum(lengths)
        self.documents = [np.append(np.arange(end - n, end) + 1, END) for n, end in zip(lengths, ends, strict=True)]
        self.ids = np.concatenate(self.documents)[: -1 if cut else None]
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and length >= 0 and start + length <= len(self), f"{length} ids from {start} of {len(self)}"
        return self.ids[start : start + length].astype(np.int64)

    def scored(self, start: int, length: int) -> np.ndarray:
        return np.array([int(id) not in self.prompts for id in self.read(start, length)], bool)


@st.composite
def texts(draw: st.DrawFn) -> tuple[Text, int]:
    """Documents of none to many ids, and the length of a sample."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=40))
    return Text(lengths, cut=draw(st.booleans()) and sum(lengths) > 0), draw(st.integers(2, 24))


def epoch(samples: Documents, number: int = 0) -> list[tuple[list[int], list[int]]]:
    """The ids and the targets of every sample of an epoch; what is no target is IGNORE."""
    indices = range(number * samples.per_epoch, (number + 1) * samples.per_epoch)
    read = [(samples.read(index), samples.scored(index)) for index in indices]
    return [(ids.tolist(), np.where(scored, ids[1:], IGNORE).tolist()) for ids, scored in read]


# --- What lies in a sample --------------------------------------------------------------------------------------------


@given(texts(), st.integers(0, 9))
def test_an_epoch_has_every_id_as_a_target_once(text_and_length: tuple[Text, int], number: int) -> None:
    text, seq_len = text_and_length
    samples = Documents(text, seq_len, 1, END)
    targets = [id for _, targets in epoch(samples, number) for id in targets if id != IGNORE]
    assert Counter(targets) == Counter(text.ids.tolist())
    filled = sum(
        len(d) + (-(-max(0, len(d) - seq_len) // (seq_len - 1))) for d in text.documents
    )  # a piece repeats an id
    if len(text) == sum(map(len, text.documents)):
        assert samples.padding == pytest.approx(1 - filled / (samples.per_epoch * seq_len))


@given(texts())
def test_a_sample_holds_whole_documents_or_a_piece_of_a_long_one(text_and_length: tuple[Text, int]) -> None:
    """Each target is predicted from the id before it in the text, and no document that fits is cut."""
    text, seq_len = text_and_length
    samples, before = Documents(text, seq_len, 1, END), {}
    for place, id in enumerate(text.ids.tolist()):
        if id != END:
            before[id] = int(text.ids[place - 1]) if place else END
    for ids, targets in epoch(samples):
        assert len(ids) == seq_len + 1 and len(targets) == seq_len
        for given_, id, target in zip(ids, ids[1:], targets, strict=False):
            assert target in (id, IGNORE)
            if target not in (IGNORE, END):
                assert given_ == before[target]
        inside = Counter(id for id in ids[1:] if id != END)
        for document in text.documents:
            found = sum(inside[id] for id in document[:-1].tolist())
            if len(document) <= seq_len:
                assert found in (0, len(document) - 1), "a document that fits is cut"
            elif ids[1] in document and ids[1] != document[0]:
                assert len(document) > seq_len and ids[0] in (END, *document.tolist())


def test_samples_by_hand() -> None:
    """Three whole documents; one of eleven ids in pieces of five, which overlap by one; what stays empty is no target."""
    samples = Documents(Text([2, 10, 1, 3]), 5, 1, END)
    no = IGNORE
    assert sorted(epoch(samples)) == sorted(
        [
            ([0, 14, 15, 16, 0, 0], [14, 15, 16, 0, no]),
            ([0, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7]),
            ([6, 7, 8, 9, 10, 11], [no, 8, 9, 10, 11]),
            ([0, 1, 2, 0, 0, 0], [1, 2, 0, no, no]),
            ([10, 11, 12, 0, 13, 0], [no, 12, 0, 13, 0]),
        ]
    )
    assert samples.padding == pytest.approx(3 / 25)
    assert sorted(epoch(Documents(Text([1, 6]), 5, 1, END))) == [
        ([0, 1, 0, 6, 7, 0], [1, 0, no, 7, 0]),
        ([0, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6]),
    ]


def test_a_text_that_is_cut_off_gets_no_end_to_learn() -> None:
    samples = Documents(Text([2, 3], cut=True), 8, 1, END)
    assert epoch(samples) == [([0, 1, 2, 0, 3, 4, 5, 0, 0], [1, 2, 0, 3, 4, 5, IGNORE, IGNORE])]
    longest_first = Documents(Text([1, 4], cut=True), 8, 1, END)
    assert epoch(longest_first) == [([0, 1, 0, 2, 3, 4, 5, 0, 0], [1, 0, 2, 3, 4, 5, IGNORE, IGNORE])]


def test_prompts_are_no_targets() -> None:
    samples = Documents(Text([4, 3], prompts=frozenset([1, 2, 5])), 9, 1, END)
    assert epoch(samples) == [([0, 1, 2, 3, 4, 0, 5, 6, 7, 0], [IGNORE, IGNORE, 3, 4, 0, IGNORE, 6, 7, 0])]
    assert Batches(samples, step_samples=2, micro_batch=1).num_targets(0) == 2 * 6


@given(texts())
def test_spans_are_those_of_a_loop(text_and_length: tuple[Text, int]) -> None:
    text, _ = text_and_length
    starts, counts = document_spans(text, END)
    spans, start = [], 0
    for document in text.documents:
        spans.append((start, len(document)))
        start += len(document)
    spans[-1] = (spans[-1][0], len(text) - spans[-1][0])  # the last may be cut off
    assert list(zip(starts.tolist(), counts.tolist(), strict=True)) == spans


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_decreasing_is_that_of_a_loop(sizes: list[int]) -> None:
    placed = best_fit(np.array(sizes), 30)
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [sample for sample, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda sample: rooms[sample])] -= size
        else:
            rooms.append(30 - size)
    used = np.bincount(placed, weights=sizes)
    assert sorted(used.tolist()) == sorted(30 - room for room in rooms)


def test_small_documents_leave_little_room() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 1, 3000).astype(int).tolist()
    samples = Documents(Text(lengths), 256, 1, END)
    assert 0 < samples.padding < 0.002
    in_turn = sum(1 for _ in _next_fit(lengths, 256))  # what packing saves
    assert samples.per_epoch < 0.9 * in_turn


def _next_fit(lengths: list[int], seq_len: int) -> Any:
    """The samples, if each document that does not fit began a new one."""
    room = 0
    for length in lengths:
        left = length + 1
        if left > room:
            yield from range(-(-left // seq_len))
            left, room = left % seq_len, seq_len
        room -= left


@pytest.mark.parametrize("group", [1, 7])
def test_groups_are_packed_by_themselves(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(list(range(20)))
    whole = Documents(text, 24, 1, END).per_epoch
    packing.pack.cache_clear()
    monkeypatch.setattr(packing, "GROUP", group)
    samples = Documents(text, 24, 1, END)
    targets = [id for _, targets in epoch(samples) for id in targets if id != IGNORE]
    assert Counter(targets) == Counter(text.ids.tolist()) and samples.per_epoch > whole
    packing.pack.cache_clear()


# --- In which order ---------------------------------------------------------------------------------------------------


def test_the_same_samples_in_another_order_each_epoch() -> None:
    text = Text(list(range(40)))
    one, other = Documents(text, 16, 1, END), Documents(text, 16, 2, END)
    first, second = epoch(one), epoch(one, 1)
    assert first != second and sorted(first) == sorted(second)
    assert epoch(other) != first and sorted(epoch(other)) == sorted(first)
    packing.pack.cache_clear()
    again = Documents(Text(list(range(40))), 16, 1, END)
    backwards = [again.read(index).tolist() for index in reversed(range(2 * again.per_epoch))][::-1]
    assert backwards == [ids for ids, _ in first + second], "the order of asking matters"
    ids = again.read(0)
    ids[:] = -1
    assert again.read(0).tolist() == first[0][0], "a sample is one that somebody wrote into"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_however_a_step_is_shared_out_it_learns_from_the_same(world_size: int) -> None:
    samples = Documents(Text(list(range(40))), 16, 1, END)
    shared = Counter[tuple[int, ...]]()
    for rank in range(world_size):
        batches = Batches(samples, step_samples=6, micro_batch=2, rank=rank, world_size=world_size)
        for micro_step in range(batches.micro_steps):
            if batches.number(micro_step) < batches.passes:
                shared.update(map(tuple, batches(3, micro_step)[1].tolist()))
    assert shared == Counter(
        tuple(np.where(samples.scored(i), samples.read(i)[1:], IGNORE).tolist()) for i in range(18, 24)
    )


def test_a_text_without_ids_is_refused() -> None:
    with pytest.raises(DataError, match="the training text is empty"):
        Documents(Text([0], cut=True), 8, 1, END)


def test_the_recipe_decides() -> None:
    text = Text([20, 30])
    assert isinstance(make_samples(DataConfig(packing="documents"), text, 8, 1, END), Documents)
    assert isinstance(make_samples(DataConfig(), text, 8, 1, END), Contiguous)


# --- In training ------------------------------------------------------------------------------------------------------

POEMS = [{"text": " ".join(str((7 * n) ** k) for k in range(1 + n % 9))} for n in range(40)]
"""Documents of 1 to 60 bytes."""
RUN: dict[str, Any] = SETTINGS | {"steps": None, "batch_tokens": 64, "micro_batch": 1, "data.packing": "documents"}
BYTES = Tokenizer.bytes()
ALONE = {"data.attend_across": False, "data.restart_positions": True}


def losses_alone(model: GPT2, ids: list[int], targets: list[int], seen: list[int] | None = None) -> list[torch.Tensor]:
    """The losses of the scored targets of a sample, where each document is read by itself."""
    numbers = documents_of(ids, BYTES.end_of_text) if seen is None else seen
    losses = []
    for number in sorted(set(numbers)):
        places = [t for t, other in enumerate(numbers) if other == number]
        logits = model(torch.tensor([[ids[t] for t in places]]))[0].log_softmax(-1)
        losses += [-row[targets[t]] for row, t in zip(logits, places, strict=True) if targets[t] != IGNORE]
    return losses


@pytest.mark.parametrize("records", [POEMS, INSTRUCTIONS], ids=["texts", "instructions"])
def test_an_epoch_in_one_step_is_the_documents_by_hand(records: list[dict[str, Any]], tmp_path: Path) -> None:
    """Loss and gradient of the step, and the validation before it, against a model that reads each document alone."""
    data = prepared(tmp_path / "p", records)
    samples = Documents(data.train, 32, 3, BYTES.end_of_text)
    config = RUN | ALONE | {"batch_tokens": 32 * samples.per_epoch, "data.source": str(data.folder), "epochs": 1}
    seen = Witness()
    folder = train(load_config([], flags(config | {"out": str(tmp_path / "run")})), seen.console)
    first, step = read_rows(folder / "metrics.jsonl")
    assert (
        step["step"] == 1 and f"{samples.per_epoch} samples an epoch, {samples.padding:.1%} of it padding" in seen.text
    )

    model = GPT2(257, 32, 16, 2, 64, 1, generator=generator_for(3, "weights"))
    by_hand = [loss for ids, targets in epoch(samples) for loss in losses_alone(model, ids[:-1], targets)]
    assert step["loss"] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    across = [loss for ids, targets in epoch(samples) for loss in losses_alone(model, ids[:-1], targets, [0] * 32)]
    assert step["loss"] != pytest.approx(torch.stack(across).mean().item(), rel=1e-4)
    torch.stack(by_hand).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert step["grad_norm"] == pytest.approx(float(norm), rel=1e-4)

    text = [BYTES.end_of_text, *data.validation.read(0, len(data.validation)).tolist()]
    scored = data.validation.scored(0, len(text) - 1).tolist()
    windows = [text[start : start + 33] for start in range(0, len(text) - 1, 32)]
    losses = [
        loss for window in windows for loss in losses_alone(model, window[:-1], window[1:])
    ]  # of all targets, in the order of documents, which is that of the text
    answers = [loss.item() for loss, is_scored in zip(losses, scored, strict=True) if is_scored]
    assert first["val_loss"] == pytest.approx(np.mean(answers), rel=1e-5)
    plain = [
        loss for window in windows for loss in losses_alone(model, window[:-1], window[1:], [0] * (len(window) - 1))
    ]
    assert first["val_loss"] != pytest.approx(np.mean([loss.item() for loss in plain]), rel=1e-4)


def test_epochs_are_counted_in_samples_of_documents(tmp_path: Path) -> None:
    data = prepared(tmp_path / "p", POEMS)
    config = load_config([], flags(RUN | {"data.source": str(data.folder), "epochs": 3}))
    count = Documents(data.train, 32, 3, BYTES.end_of_text).per_epoch
    assert settle(config).config.steps == -(-3 * count // 2)
    contiguous = load_config(
        [], flags(RUN | {"data.source": str(data.folder), "epochs": 3, "data.packing": "contiguous"})
    )
    assert settle(contiguous).config.steps != -(-3 * count // 2)


def test_a_run_that_is_resumed_is_the_run_that_was_not(tmp_path: Path) -> None:
    source = {"data.source": str(prepared(tmp_path / "p", POEMS).folder)}
    config = RUN | ALONE | source | {"steps": 6, "checkpoint_every": 3, "model.dropout": 0.1}

    def losses(name: str, **changes: Any) -> list[Any]:
        run = load_config([], flags(config | changes | {"out": str(tmp_path / name)}))
        return [row["loss"] for row in read_rows(train(run, Console(quiet=True)) / "metrics.jsonl") if row["step"]]

    at_once = losses("whole")
    assert losses("cut") == at_once and len(at_once) == 6
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    assert losses("cut") == at_once and (tmp_path / "cut" / "checkpoints" / "step-00000006").is_dir()
    assert losses("other", **{"data.attend_across": True}) != at_once
    assert losses("third", **{"data.packing": "contiguous"}) != at_once
    with pytest.raises(Exception, match=r"data\.packing"):
        losses("cut", **{"data.packing": "contiguous"})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(strategy: str, tmp_path: Path) -> None:
    source = {"data.source": str(prepared(tmp_path / "p", POEMS).folder)}
    config = RUN | ALONE | source | {"steps": 3, "model.num_layers": 2, "model.windows": [5, None]}
    losses = {}
    for name, processes in {"one": 1, "two": 2}.items():
        values = config | {"out": str(tmp_path / name), "system.strategy": strategy if processes > 1 else "auto"}
        with fork_command(processes, ["train", *flags(values)], tmp_path) as ranks:
            assert ranks.wait() == [0] * processes, ranks.everything_said
        losses[name] = [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if row["step"]]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-6) and losses["one"][0] != losses["one"][1]


def test_eval_reads_as_training_did(tmp_path: Path) -> None:
    source = {"data.source": str(prepared(tmp_path / "p", POEMS).folder)}
    found = {}
    for name, changes in {"alone": ALONE, "across": {}}.items():
        config = load_config([], flags(RUN | source | changes | {"steps": 2, "out": str(tmp_path / name)}))
        rows = list(read_rows(train(config, Console(quiet=True)) / "metrics.jsonl"))
        model, tokenizer = open_model(str(tmp_path / name))
        result = evaluate(str(tmp_path / name), model, tokenizer, ["perplexity"])["perplexity"]
        assert result["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)
        found[name] = result["loss"]
    assert found["alone"] != pytest.approx(found["across"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.packing": "bins"}, "contiguous"),
        ({"data.restart_positions": True, "model.position": "rope"}, "rope needs no restart"),
        ({"data.packing": "documents", "seq_len": 1, "batch_tokens": 4}, "seq_len of 2 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], flags(changes))


def test_what_changes_nothing_is_allowed() -> None:
    rope = GPT2Config(position="rope")
    RunConfig(model=rope, data=DataConfig(attend_across=False, restart_positions=True))
    RunConfig(data=DataConfig(restart_positions=True))
    assert Borders(BYTES.end_of_text)(torch.zeros(1, 2, dtype=torch.int64)) == {}
