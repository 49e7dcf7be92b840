"""The writer in the background: training may go on, the disk may be full, and the process may die; what counts stays."""

import errno
import json
import math
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2lab import manifest
from gpt2lab.checkpoint import MODEL, STATE, latest, load, optimizer_tensors, rotate, step_folder, sweep
from gpt2lab.config import to_dict, to_yaml
from gpt2lab.errors import CheckpointError, ResourceError
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.writer import TRIES, Writer
from tests.test_checkpoint import DIED, DONE, TOKENIZER, at_each_operation, die, learner_at, write
from tests.test_train import assert_equal, tree


class Acting(Tokenizer):
    """A tokenizer that acts when it is saved: in the middle of a checkpoint."""

    def __init__(self, act: Callable[[Path], object]) -> None:
        super().__init__(TOKENIZER._backend)
        self.act = act

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        self.act(Path(folder))


def give(writer: Writer, step: int, *, background: bool, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> None:
    """The checkpoint that `tests.test_checkpoint.write` writes, through a writer."""
    model, optimizer = learner_at(step)
    state = {"step": step, "run_id": "a run"} | options.pop("state", {})
    writer.save(
        step, model.state_dict(), optimizer_tensors(model, optimizer), recipe=to_yaml({"model": to_dict(model.config)}),
        tokenizer=tokenizer, state=state, background=background, **options,
    )  # fmt: skip


def finish(writer: Writer, step: int, *, background: bool = True, **options: Any) -> None:
    """As `give`, and wait until it is written."""
    give(writer, step, background=background, **options)
    writer.wait()


def steps_in(run: Path) -> list[int]:
    """The steps that a run has folders of; nothing else may lie beside them but pins."""
    names = sorted(name for name in os.listdir(run / "checkpoints") if not name.endswith(".keep"))
    return [int(name.removeprefix("step-")) for name in names]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, said: list[str]) -> Iterator[Writer]:
    writer = Writer(tmp_path, 2, said.append)
    yield writer
    writer.close()


# --- What it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_bytes", [300, 10**6])
def test_the_files_are_the_same_as_in_the_foreground(file_bytes: int, writer: Writer, tmp_path: Path) -> None:
    for background in (True, False):
        finish(writer, 3, background=background, file_bytes=file_bytes)
        step_folder(tmp_path, 3).rename(tmp_path / str(background))
    write(tmp_path / "by itself", 3, file_bytes=file_bytes)
    trees = [tree(path) for path in (tmp_path / "True", tmp_path / "False", step_folder(tmp_path / "by itself", 3))]
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) >= 6


class Gate(Acting):
    """In the middle of a checkpoint it says so, and goes on when it may."""

    def __init__(self) -> None:
        super().__init__(self.pass_through)
        self.reached, self.open = threading.Event(), threading.Event()

    def pass_through(self, _: Path) -> None:
        self.reached.set()
        assert self.open.wait(60)


def test_what_training_changes_meanwhile_is_not_in_it(writer: Writer, tmp_path: Path) -> None:
    first, second = Gate(), threading.Event()
    give(writer, 2, background=True, tokenizer=first)
    assert first.reached.wait(60)
    assert writer.busy and os.listdir(tmp_path / "checkpoints") == [".step-00000002.part"]
    threading.Timer(0.05, first.open.set).start()
    model, _ = learner_at(3)
    weights, late = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.zeros(3)
    writer._thread.submit(second.wait, 60)  # the thread begins when they have changed
    writer.save(
        3, weights, {"z/late": late}, recipe=to_yaml({"model": to_dict(model.config)}), tokenizer=TOKENIZER,
        state={"step": 3}, background=True,
    )  # fmt: skip
    assert load(step_folder(tmp_path, 2)).state["step"] == 2  # the second one waited for the first
    for tensor in (*weights.values(), late):
        tensor.fill_(7.0)
    second.set()
    writer.wait()
    assert not writer.busy
    found = load(step_folder(tmp_path, 3))
    assert_equal(found.weights(), model.state_dict())
    assert_equal(found.optimizer(), {"z/late": torch.zeros(3)})
    give(writer, 4, background=True)  # into the same memory, with other names and shapes
    writer.wait()
    assert_equal(load(step_folder(tmp_path, 4)).optimizer(), optimizer_tensors(*learner_at(4)))


def test_memory_is_kept_from_one_checkpoint_to_the_next(writer: Writer, tmp_path: Path) -> None:
    places: list[dict[str, int]] = []
    for step in (1, 2):
        give(writer, step, background=True)
        places.append({name: tensor.data_ptr() for name, tensor in writer._buffers["weights"].items()})
    model, _ = learner_at(2)
    own = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert places[0] == places[1] and not set(own.values()) & set(places[0].values())


# --- Which are kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "pinned", "keep", "kept"),
    [
        ({1: 3.0, 2: 2.0, 3: 2.5, 4: 2.6}, [], 1, [2, 4]),
        ({1: 3.0, 2: 2.0, 3: 2.5, 4: 1.9}, [], 1, [4]),
        ({1: 3.0, 2: 2.0, 3: 2.5, 4: 2.6}, [1], 2, [1, 2, 3, 4]),
        ({1: None, 2: 2.0, 3: None, 4: None}, [3], 1, [2, 3, 4]),
        ({1: None, 2: None, 3: None, 4: None}, [], 2, [3, 4]),
        ({1: math.nan, 2: 2.0, 3: 3.0, 4: math.nan}, [], 1, [2, 4]),
        ({1: 2.0, 2: 2.0, 3: 3.0, 4: 3.0}, [], 1, [2, 4]),  # of equals, the newest
    ],
)
def test_the_newest_the_best_and_the_pinned_are_kept(
    losses: dict[int, float | None], pinned: list[int], keep: int, kept: list[int], tmp_path: Path
) -> None:
    for step, loss in losses.items():
        write(tmp_path, step, val_loss=loss)
    for step in pinned:
        step_folder(tmp_path, step).with_name(f"step-{step:08d}.keep").touch()
    before = {step: tree(step_folder(tmp_path, step)) for step in kept}
    rotate(tmp_path, keep)
    assert steps_in(tmp_path) == kept
    assert {step: tree(step_folder(tmp_path, step)) for step in kept} == before
    newest, troubles = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 4 and not troubles  # a pin is no checkpoint


def test_a_damaged_one_is_neither_the_best_nor_removed(tmp_path: Path) -> None:
    for step, loss in {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}.items():
        write(tmp_path, step, val_loss=loss)
    for step in (1, 5):
        (step_folder(tmp_path, step) / MODEL).write_bytes(b"")
    rotate(tmp_path, 1)
    assert steps_in(tmp_path) == [1, 2, 4, 5]


def test_rotation_hashes_only_what_is_new(writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    measure = manifest.measure
    monkeypatch.setattr(manifest, "measure", lambda path, **how: (hashed.append(path), measure(path, **how))[1])
    give(writer, 1, background=True)
    give(writer, 2, background=False)
    hashed.clear()
    give(writer, 3, background=False)
    read_back = [path for path in hashed if ".part" not in str(path)]
    assert {path.parent for path in read_back} == {step_folder(tmp_path, 3)}
    assert sorted([*(path.name for path in read_back), manifest.MANIFEST]) == sorted(os.listdir(read_back[0].parent))
    assert not [
        path for path in hashed if path.name == MODEL and ".part" in str(path)
    ]  # that was hashed as it was written
    assert steps_in(tmp_path) == [2, 3]


def test_a_strange_name_beside_the_step_folders_is_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    for name in ("mine", "step-00000001.backup", "step-2-backup"):
        shutil.copytree(step_folder(tmp_path, 1), tmp_path / "checkpoints" / name)
    rotate(tmp_path, 1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "mine", "step-00000001.backup", "step-00000003", "step-2-backup",
    ]  # fmt: skip


# --- Errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system lets no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail(writer: Writer, step: int) -> None:
    with files_up_to(2000):
        finish(writer, step)


def test_a_full_disk_is_tried_again_with_the_next_checkpoint(writer: Writer, said: list[str], tmp_path: Path) -> None:
    finish(writer, 1)
    for step in (2, 3):
        fail(writer, step)
        assert steps_in(tmp_path) == [1] and len(said) == step - 1
    assert all(word in said[1] for word in ("step-00000003", "2 of 3", "bytes are needed", "are free", "Fix: "))
    finish(writer, 4)
    assert steps_in(tmp_path) == [1, 4]
    for step in range(5, 5 + TRIES - 1):  # counted from the start again
        fail(writer, step)
    assert len(said) == 4
    with pytest.raises(ResourceError) as raised:
        fail(writer, 9)
    assert raised.value.exit_code == 5 and str(step_folder(tmp_path, 9)) in str(raised.value)
    assert len(said) == 4 and steps_in(tmp_path) == [1, 4]
    writer.wait()  # it was said once
    finish(writer, 10)
    assert steps_in(tmp_path) == [4, 10]


def test_a_full_disk_ends_a_save_in_the_foreground_at_once(writer: Writer, said: list[str], tmp_path: Path) -> None:
    give(writer, 1, background=False)
    with files_up_to(2000), pytest.raises(ResourceError, match="bytes are needed"):
        give(writer, 2, background=False)
    assert steps_in(tmp_path) == [1] and said == []


def test_too_many_failures_are_told_to_the_save_that_comes_next(writer: Writer, tmp_path: Path) -> None:
    for step in range(1, TRIES):
        fail(writer, step)
    with files_up_to(2000):
        give(writer, TRIES, background=True)
        while writer.busy:
            pass
    with pytest.raises(ResourceError):
        give(writer, 8, background=True)


def no_room(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_says_what_is_needed_and_what_is_free(writer: Writer, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as raised:
        give(writer, 2, background=False, tokenizer=Acting(no_room))
    tensors = [*learner_at(2)[0].state_dict().values(), *optimizer_tensors(*learner_at(2)).values()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert all(
        word in str(raised.value) for word in ("disk full", f"{needed:,} bytes are needed", str(tmp_path), "Fix:")
    )
    assert os.listdir(tmp_path / "checkpoints") == []


def spoil(aside: Path) -> None:
    """What a bad disk does: it keeps another byte than it was given."""
    content = (aside / MODEL).read_bytes()
    (aside / MODEL).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_keeps_something_else_ends_training(background: bool, writer: Writer, tmp_path: Path) -> None:
    """And nothing is removed: the newest that is whole stays."""
    give(writer, 1, background=False)
    give(writer, 2, background=False)
    with pytest.raises(CheckpointError, match=r"damaged .*model\.safetensors"):
        finish(writer, 3, background=background, tokenizer=Acting(spoil))
    newest, _ = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 2 and steps_in(tmp_path) == [1, 2, 3]


def test_the_end_waits_for_what_is_being_written(tmp_path: Path) -> None:
    writer, gate = Writer(tmp_path, 2, print), Gate()
    give(writer, 1, background=True, tokenizer=gate)
    threading.Timer(0.05, gate.open.set).start()
    writer.close()
    assert steps_in(tmp_path) == [1]
    with pytest.raises(RuntimeError):
        give(writer, 2, background=True)


# --- Death ------------------------------------------------------------------------------------------------------------


def test_a_writer_in_the_background_may_die_at_any_operation(tmp_path: Path) -> None:
    """At every sixth operation of a save in several files with a best one kept; tests/campaigns/kill_points.py tries all."""
    run, spare = tmp_path / "run", tmp_path / "spare"
    for step, loss in {1: 1.0, 2: 2.0, 3: 3.0}.items():
        write(spare, step, val_loss=loss)
    expected: dict[int, dict[str, Tensor]] = {step: learner_at(step)[0].state_dict() for step in (3, 4)}

    def work() -> None:
        writer = Writer(run, 1, print)
        give(writer, 4, background=True, file_bytes=1000)
        writer.close()

    found: list[int] = []
    shutil.copytree(spare, run)
    for code in at_each_operation(work, die, every=6):
        newest, troubles = latest(run)
        assert code in (DIED, DONE) and newest is not None and troubles == []
        assert_equal(newest.weights(), expected[newest.state["step"]])
        assert_equal(newest.optimizer(), optimizer_tensors(*learner_at(newest.state["step"])))
        assert json.loads(newest.read(STATE))["step"] == newest.state["step"]
        found.append(newest.state["step"])
        sweep(run)
        writer = Writer(run, 1, print)
        give(writer, 4, background=True, file_bytes=1000)
        writer.close()
        assert steps_in(run) == [1, 4]
        shutil.rmtree(run)
        shutil.copytree(spare, run)
    assert found == sorted(found) and {*found} == {3, 4} and len(found) > 10
