"""A logged step again: the same bits, from a run folder that is only read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpt2lab import checkpoint
from tests.forked import fork_command
from tests.test_distributed import BASE, stop_after
from tests.test_health import poison
from tests.test_train import flags, rows, sentences, tree

pytestmark = pytest.mark.usefixtures("workplace", "short_samples")

STEPS = 12
REPLAY: dict[str, Any] = BASE | {"steps": STEPS, "checkpoint_every": 5, "keep_checkpoints": 1, "validate_every": 3}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp 2": (2, {"micro_batch": 1}),
    "fsdp 2": (2, {"system.strategy": "fsdp"}),
    "exact, ddp 2": (2, {"system.exact": True}),
    "experts, exact": (1, {"system.exact": True, "model.num_experts": 4, "model.experts_per_token": 2}),
}
"""Processes and settings; all have dropout. Only the last checkpoint is kept, so most steps are replayed from the start."""


def train(workplace: Path, name: str) -> Path:
    """The run of that name; made once."""
    folder = workplace / name.replace(" ", "-")
    if not folder.exists():
        processes, changes = RUNS[name]
        with fork_command(processes, ["train", *flags(REPLAY | {"out": folder.name} | changes)], workplace) as ranks:
            assert ranks.wait() == [0] * processes, ranks.everything_said
    return folder


def replay(run: Path, step: int, processes: int = 1, code: int = 0) -> str:
    """``gpt2lab replay RUN --step N --json``; return what the processes said. Rank 0 is the one that compares."""
    with fork_command(processes, ["replay", str(run), f"--step={step}", "--json"], run.parent) as ranks:
        assert ranks.wait()[0] == code, ranks.everything_said
        return ranks.everything_said


def answer(said: str) -> dict[str, Any]:
    [line] = [line for line in said.splitlines() if line.startswith("{")]
    return dict(json.loads(line))


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_computed_again_to_the_same_bits(name: str, workplace: Path) -> None:
    run = train(workplace, name)
    before = tree(run)
    for step in (2, STEPS):
        found = answer(replay(run, step, RUNS[name][0]))
        assert found["same"] and found["step"] == step
        assert found["after_step"] == 0, "the last checkpoint is that of the last step"
        logged, before_it = rows(run)[step], rows(run)[step - 1]
        assert found["replayed"].items() <= logged.items()
        assert all(found["replayed"][key] != before_it[key] for key in ("loss", "grad_norm"))
        text = sentences()
        for sample, start in enumerate(found["batch"]["sample_starts"]):
            assert found["batch"]["text"][str(sample)] == text[start : start + 17]
    assert tree(run) == before


def test_it_begins_at_the_newest_whole_checkpoint_before_the_step(place: Path) -> None:
    with fork_command(1, ["train", *flags(REPLAY | {"keep_checkpoints": 9})], place) as ranks:
        assert ranks.wait() == [0], ranks.everything_said
    run = place / "run"
    begins = {step: answer(replay(run, step))["after_step"] for step in (5, 6, 10, 11)}
    assert begins == {5: 0, 6: 5, 10: 5, 11: 10}
    (checkpoint.step_folder(run, 10) / "model.safetensors").write_bytes(b"spoilt")
    found = answer(replay(run, 11))
    assert found["after_step"] == 5 and found["same"]


@pytest.fixture
def copied(workplace: Path, place: Path) -> Path:
    """A run folder that may be changed, beside the text."""
    return Path(shutil.copytree(train(workplace, "single"), place / "run"))


@pytest.mark.parametrize(("key", "by"), [("loss", 1e-15), ("grad_norm", 1e-7), ("learning_rate", 1e-9)])
def test_a_row_that_does_not_repeat_is_reported(key: str, by: float, copied: Path) -> None:
    """The smallest changes count: the last bit of a number."""
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[7])
    true, row[key] = row[key], row[key] + by
    assert row[key] != true
    lines[7] = json.dumps(row)
    (copied / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    said = replay(copied, 7, code=7)
    assert answer(said)["replayed"][key] == true
    [line] = [line for line in said.splitlines() if line.startswith("gpt2lab: ")]
    assert "the step does not repeat" in line and "step 7" in line and "Fix: " in line
    replay(copied, 6), replay(copied, 8)


def test_other_weights_do_not_repeat(copied: Path) -> None:
    """The numbers come from the weights: with those of another seed they are others."""
    recipe = copied / "config.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 1337", "seed: 1338"))
    replay(copied, 7, code=7)


@pytest.mark.parametrize("step", [0, -1, STEPS + 1, 10**9])
def test_a_step_that_was_not_done_is_refused(step: int, workplace: Path) -> None:
    said = replay(train(workplace, "single"), step, code=2)
    assert f"--step={step}" in said and f"steps 1 to {STEPS} are in" in said and said.count("\n") == 1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        said = replay(tmp_path / name, 1, code=4)
        assert said.startswith("gpt2lab: no run") and said.count("\n") == 1
    assert not (tmp_path / "absent").exists()


def test_a_skipped_step_is_skipped_again(place: Path) -> None:
    words = ["train", *flags(REPLAY | {"model.dropout": 0, "micro_batch": 2})]
    with fork_command(2, words, place, poison(1)) as ranks:
        assert ranks.wait() == [0, 0], ranks.everything_said
    run = place / "run"
    assert "skipped" in rows(run)[5]
    for step in (5, 6):
        with fork_command(2, ["replay", "run", f"--step={step}", "--json"], place, poison(1)) as ranks:
            assert ranks.wait() == [0, 0], ranks.everything_said
            assert ("skipped" in answer(ranks.said(0))["replayed"]) == (step == 5)
    replay(run, 6, processes=2, code=7)  # what spoilt steps 3 and 5 is not there this time


@pytest.mark.parametrize("step", [4, 9])
def test_each_step_is_replayed_as_it_was_computed(step: int, place: Path) -> None:
    """Six steps on one process, then six on two: rounding is that of one, then that of the other."""
    settings = REPLAY | {"checkpoint_every": 6, "keep_checkpoints": 9, "micro_batch": 1}
    with fork_command(1, ["train", *flags(settings)], place, stop_after(6)) as ranks:
        assert ranks.wait() == [75]
    with fork_command(2, ["train", *flags(settings)], place) as ranks:
        assert ranks.wait() == [0, 0], ranks.everything_said
    found = answer(replay(place / "run", step, processes=1 if step <= 6 else 2))
    assert found["same"] and found["after_step"] == (0 if step <= 6 else 6)
    with fork_command(1, ["train", *flags(settings | {"out": "alone"})], place) as ranks:
        assert ranks.wait() == [0], ranks.everything_said
    alone_is_the_same = rows(place / "alone")[step] == rows(place / "run")[step]
    assert alone_is_the_same == (step <= 6), "the control: on one process alone, the later steps are rounded otherwise"
