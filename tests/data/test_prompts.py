"""Of an instruction only the response is learned from: prompts are read, and are no targets, from the file to the loss."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2lab.config import DataConfig
from gpt2lab.data import survey
from gpt2lab.data.batches import Batches
from gpt2lab.data.prepare import prepare
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.samples import Contiguous
from gpt2lab.data.shard_writer import ShardWriter
from gpt2lab.data.shards import Shards
from gpt2lab.evaluate.tasks import evaluate
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.loss import IGNORE
from gpt2lab.recipe import load_config
from gpt2lab.seeds import generator_for
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.tracking import Console, read_rows
from gpt2lab.train import train
from gpt2lab.weights import open_model
from tests.reference import assert_differ, assert_same
from tests.test_train import flags

BYTES = Tokenizer.bytes()
INSTRUCTIONS = [
    {"instruction": f"Count to {n}.", "input": "Aloud!" if n % 3 else "", "output": " ".join(map(str, range(1, n + 1)))}
    for n in range(1, 16)
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Is {n} even?"},
            {"role": "assistant", "content": "Yes." if n % 2 == 0 else "No."},
            {"role": "user", "content": "Thank you"},
            {"role": "assistant", "content": f"You are welcome {n} times."},
        ]
    }
    for n in range(15)
]


def parts_of(record: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each part of a record, and whether it is an answer; a line break ends every part but the last."""
    if "messages" in record:
        parts = [(message["content"], message["role"] == "assistant") for message in record["messages"]]
    else:
        parts = [(record[name], name == "output") for name in ("instruction", "input", "output") if record[name]]
    return [(text + "\n", scored) for text, scored in parts[:-1]] + parts[-1:]


def expected(records: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """All bytes of the records, each closed by a separator, and which of them are answers."""
    ids, scored = list[int](), list[bool]()
    for record in records:
        for text, answer in parts_of(record):
            ids += text.encode()
            scored += [answer] * len(text.encode())
        ids, scored = [*ids, BYTES.end_of_text], [*scored, answer]
    return ids, scored


def prepared(
    folder: Path, records: list[dict[str, Any]], tokenizer: str | Tokenizer = BYTES, **changes: Any
) -> Prepared:
    """The records as text to learn from, and the first of them to validate on."""
    folder.mkdir(exist_ok=True)
    for name, chosen in (("train", records), ("validation", records[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))
    config = DataConfig(source=str(folder / "train.jsonl"), validation=str(folder / "validation.jsonl"), **changes)
    return prepare(config, tokenizer, folder=folder / "prepared")


@pytest.mark.parametrize("records", [INSTRUCTIONS, CHATS], ids=["instructions", "chats"])
@pytest.mark.parametrize("shard_chars", [2**28, 100])
def test_the_answers_of_a_file_are_scored(
    records: list[dict[str, Any]], shard_chars: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "SHARD_CHARS", shard_chars)
    shards = prepared(tmp_path / "p", records).train
    ids, scored = expected(records)
    assert (len(shards.headers) > 1) == (shard_chars == 100)
    assert shards.read(0, len(shards)).tolist() == ids
    assert shards.scored(0, len(shards)).tolist() == scored
    for start in range(0, len(ids) - 7, 5):
        assert shards.scored(start, 7).tolist() == scored[start : start + 7]
    assert 0 < sum(scored) < len(scored)


def test_a_plain_text_is_all_scored(tmp_path: Path) -> None:
    shards = prepared(tmp_path / "p", [{"text": f"text {n}"} for n in range(20)]).train
    assert shards.scored(0, len(shards)).all() and not any(header.prompts for header in shards.headers)


def test_what_is_a_prompt_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    text = [{"text": "\n".join((r["instruction"], r["output"]))} for r in INSTRUCTIONS]
    asked = [{"instruction": r["instruction"], "output": r["output"]} for r in INSTRUCTIONS]
    one, other = prepared(tmp_path / "a", text), prepared(tmp_path / "b", asked)
    assert one.train.read(0, len(one.train)).tolist() == other.train.read(0, len(other.train)).tolist()
    assert one.train.fingerprint != other.train.fingerprint
    cached = [prepare(DataConfig(source=str(tmp_path / name / "train.jsonl")), BYTES).folder for name in "ab"]
    assert cached[0] != cached[1]


def test_prompts_are_encoded_by_themselves(tmp_path: Path) -> None:
    words = Tokenizer.train_bpe(["Count to 3.\n1 2 3 " * 50], 300)
    shards = prepared(tmp_path / "p", INSTRUCTIONS, words).train
    ids = [id for record in INSTRUCTIONS for text, _ in parts_of(record) for id in words.encode(text).tolist()]
    assert [id for id in shards.read(0, len(shards)).tolist() if id != words.end_of_text] == ids


def test_a_changed_prompt_in_a_shard_is_found(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.bin"
    with ShardWriter(path, BYTES) as writer:
        writer.add(np.arange(5), 5, documents=0, scored=False)
        writer.add(np.arange(3), 3, documents=0, scored=False)
        writer.add(np.arange(4), 3, documents=1)
        assert writer.finish().prompts == 1
    assert Shards([path]).scored(0, 12).tolist() == [False] * 8 + [True] * 4
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="not the ones that were written"):
        Shards([path])


# --- In training ------------------------------------------------------------------------------------------------------


def test_prompts_are_no_targets(tmp_path: Path) -> None:
    shards = prepared(tmp_path / "p", INSTRUCTIONS).train
    ids, scored = expected(INSTRUCTIONS)
    samples = Contiguous(shards, seq_len=16, seed=1)
    batches = Batches(samples, step_samples=6, micro_batch=2)
    total = 0
    for micro_step in range(3):
        token_ids, targets = batches(0, micro_step)
        for row, start in enumerate(map(samples.start, batches.indices(0, micro_step))):
            wanted = [id if answer else IGNORE for id, answer in zip(ids, scored, strict=True)][start + 1 : start + 17]
            assert token_ids[row].tolist() == ids[start : start + 16] and targets[row].tolist() == wanted
            total += sum(target != IGNORE for target in wanted)
    assert batches.num_targets(0) == total and 0 < total < 6 * 16


SETTINGS: dict[str, Any] = {
    "model.num_layers": 1, "model.num_heads": 2, "model.embed_dim": 16, "model.max_seq_len": 32, "steps": 2,
    "batch_tokens": 128, "micro_batch": 2, "optim.clip": 0, "optim.name": "sgd", "optim.weight_decay": 0,
    "optim.learning_rate": 0.1, "optim.warmup_steps": 0, "sample_every": 0, "tokenizer": "bytes", "seed": 3,
    "system.device": "cpu", "system.precision": "fp32",
}  # fmt: skip


def test_the_loss_and_its_gradient_are_those_of_the_responses(tmp_path: Path) -> None:
    """Against a model that is asked for every logit, and the mean of the losses of the answers alone."""
    folder = prepared(tmp_path / "p", INSTRUCTIONS).folder
    config = load_config([], flags(SETTINGS | {"data.source": str(folder), "out": str(tmp_path / "run")}))
    rows = list(read_rows(train(config, Console(quiet=True)) / "metrics.jsonl"))
    shards = prepared(tmp_path / "p", INSTRUCTIONS).train
    ids, scored = expected(INSTRUCTIONS)
    starts = [Contiguous(shards, seq_len=32, seed=3).start(index) for index in range(4)]
    model = GPT2(257, 32, 16, 2, 64, 1, generator=generator_for(3, "weights"))
    every, answers = list[torch.Tensor](), list[torch.Tensor]()
    for start in starts:
        logits = model(torch.tensor([ids[start : start + 32]]))[0].log_softmax(-1)
        losses = -logits[torch.arange(32), torch.tensor(ids[start + 1 : start + 33])]
        every.append(losses)
        answers.append(losses[torch.tensor(scored[start + 1 : start + 33])])
    loss = torch.cat(answers).mean()
    assert_same(torch.tensor(rows[1]["loss"]), loss.detach(), within=1e-5)
    assert_differ(torch.tensor(rows[1]["loss"]), torch.cat(every).mean().detach(), by=1e-4, what="all tokens")
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert rows[1]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_the_validation_loss_is_that_of_the_responses(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "p", INSTRUCTIONS).folder
    config = load_config([], flags(SETTINGS | {"data.source": str(folder), "out": str(tmp_path / "run")}))
    rows = list(read_rows(train(config, Console(quiet=True)) / "metrics.jsonl"))
    ids, scored = expected(INSTRUCTIONS[:3])
    model = GPT2(257, 32, 16, 2, 64, 1, generator=generator_for(3, "weights"))
    losses = list[float]()
    text = [BYTES.end_of_text, *ids]
    for start in range(0, len(ids), 32):
        logits = model(torch.tensor([text[start : start + 32]]))[0].log_softmax(-1).detach()
        losses += [-float(logits[at, id]) for at, id in enumerate(text[start + 1 : start + 33])]
    answers = [loss for loss, answer in zip(losses, scored, strict=True) if answer]
    assert rows[0]["val_loss"] == pytest.approx(sum(answers) / len(answers), rel=1e-5)
    assert rows[0]["val_loss"] != pytest.approx(sum(losses) / len(losses), rel=1e-5)
    trained, tokenizer = open_model(str(tmp_path / "run"))
    scored_again = evaluate(str(tmp_path / "run"), trained, tokenizer, ["perplexity"])["perplexity"]
    assert scored_again["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-5) and scored_again["tokens"] == sum(
        scored
    )
