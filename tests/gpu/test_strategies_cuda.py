"""Training on CUDA: every strategy on one rank is the same training, compiled, in bf16, offloaded, and exactly again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_train import flags, sentences

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS: dict[str, Any] = {
    "tokenizer": "bytes", "data.source": "text.txt", "data.validation_tokens": 500, "steps": 20, "batch_tokens": 1024,
    "micro_batch": 4, "seq_len": 64, "validate_every": 10, "checkpoint_every": 10, "optim.learning_rate": 1e-3,
    "model.max_seq_len": 64, "model.embed_dim": 64, "model.num_heads": 2, "model.num_layers": 2,
    "system.device": "cuda", "system.precision": "fp32",
}  # fmt: skip


def train(place: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """The rows of a run in a process of its own, under torchrun, as on many GPUs."""
    (place / "text.txt").write_text(sentences())
    words = ["-m", "gpt2lab", "train", *flags(SETTINGS | {key.replace("__", "."): v for key, v in changes.items()})]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", *words]
    environment = os.environ | {"GPT2LAB_CACHE": str(place / "cache")}
    done = subprocess.run(
        [*command, f"--out={name}"], cwd=place, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    assert len(ours) == len(theirs) == 21
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(ours[1:], theirs[1:], strict=True))


CHANGES: list[tuple[dict[str, Any], float]] = [
    ({"system__strategy": "ddp"}, 1e-5),
    ({"system__strategy": "fsdp"}, 1e-5),
    ({"system__strategy": "fsdp", "system__offload": True}, 1e-5),
    ({"system__strategy": "fsdp", "system__activation_checkpointing": True}, 1e-5),
    ({"system__compile": True}, 1e-4),
    ({"system__strategy": "fsdp", "system__compile": True}, 1e-4),
    ({"system__precision": "bf16"}, 3e-2),
    ({"system__strategy": "fsdp", "system__precision": "bf16"}, 3e-2),
    ({"system__precision": "fp16"}, 3e-2),
]


@pytest.mark.parametrize(("changes", "tolerance"), CHANGES, ids=[str(changes) for changes, _ in CHANGES])
def test_the_same_training(changes: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    single = train(tmp_path, "single")
    assert difference(train(tmp_path, "other", **changes), single) < tolerance
    control = train(tmp_path, "control", seed=2)
    assert difference(control, single) > 1e-3


def test_exact_is_the_same_to_the_bit(tmp_path: Path) -> None:
    single = train(tmp_path, "single", system__exact=True)
    for strategy in ("ddp", "fsdp"):
        assert difference(train(tmp_path, strategy, system__exact=True, system__strategy=strategy), single) == 0


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole = train(tmp_path, "whole")
    assert len(train(tmp_path, "parts", steps=10)) == 11
    parts = train(tmp_path, "parts", steps=10)  # nothing is left to do
    assert len(parts) == 11 and len(whole) == 21
