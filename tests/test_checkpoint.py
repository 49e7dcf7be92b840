"""A step folder is whole or not there: every changed byte is found, and a writer may die at any moment."""

import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as as_safetensors
from torch import Tensor

from gpt2lab import checkpoint, manifest
from gpt2lab import tensors as tensors_module
from gpt2lab.checkpoint import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    STATE,
    latest,
    load,
    optimizer_tensors,
    rotate,
    save,
    step_folder,
    sweep,
)
from gpt2lab.config import OptimConfig, to_dict, to_yaml
from gpt2lab.errors import CheckpointError, LabError
from gpt2lab.manifest import MANIFEST, verify
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.optim import make_optimizer
from gpt2lab.recipe import load_config
from gpt2lab.tensors import save_tensors
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.train import train
from tests.test_train import SETTINGS, Witness, assert_equal, flags, sentences, tree

TOKENIZER = Tokenizer.chars(["abc"])
GOLDEN = Path(__file__).parent / "golden"
"""A checkpoint of each format, written by the code of its time; all hold the same model, and must be read for ever."""


def learner(seed: int = 0, updates: int = 2, optim: str = "adamw") -> tuple[GPT2, torch.optim.Optimizer]:
    """A model of 400 numbers that has learned a little, and its optimizer."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT2(TOKENIZER.vocab_size, 4, 4, 1, 4, 1, generator=generator)
    optimizer = make_optimizer(model, OptimConfig(name=optim))
    for update in range(updates):
        learn(model, optimizer, update)
    return model, optimizer


def learn(model: GPT2, optimizer: torch.optim.Optimizer, update: int) -> None:
    token_ids = torch.randint(4, (2, 5), generator=torch.Generator().manual_seed(update))
    model(token_ids[:, :-1], token_ids[:, 1:]).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


learner_at = functools.cache(learner)


def write(run: Path, step: int, run_id: str = "a run", file_bytes: int = 10**6, **state: Any) -> Path:
    """The checkpoint of a step, with weights of its own."""
    folder = step_folder(run, step)
    save_learner(folder, *learner_at(step), state={"step": step, "run_id": run_id} | state, file_bytes=file_bytes)
    return folder


def save_learner(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer | None = None, **about: Any) -> None:
    tensors = optimizer_tensors(model, optimizer) if optimizer is not None else None
    recipe = to_yaml({"model": to_dict(model.config)})
    save(folder, model.state_dict(), recipe=recipe, tokenizer=TOKENIZER, optimizer=tensors, **about)


def weights(folder: Path) -> dict[str, Tensor]:
    return load(folder).open_model()[0].state_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, 3)


# --- Round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("file_bytes", [1, 10**6])
def test_what_is_saved_comes_back_to_the_bit(optim: str, updates: int, file_bytes: int, tmp_path: Path) -> None:
    model, optimizer = learner(updates=updates, optim=optim)
    state = {"step": updates, "note": "\u00e9", "elapsed_seconds": 0.1 + 0.2}
    save_learner(tmp_path / "saved", model, optimizer, state=state, file_bytes=file_bytes)
    loaded = load(tmp_path / "saved")
    assert loaded.state == state
    read, tokenizer = loaded.open_model()
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert read.config == model.config and not read.training
    assert_equal(read.state_dict(), model.state_dict())
    # Whoever goes on from it takes the same next step; without its optimizer, another one.
    follower, follower_s = learner(seed=1, updates=0, optim=optim)
    loaded.load_weights(follower)
    loaded.load_optimizer(follower, follower_s)
    stranger, stranger_s = learner(seed=1, updates=0, optim=optim)
    loaded.load_weights(stranger)
    for pair in ((model, optimizer), (follower, follower_s), (stranger, stranger_s)):
        learn(*pair, updates)
    assert_equal(follower.state_dict(), model.state_dict())
    if updates:
        assert not torch.equal(stranger.token_embedding.weight, model.token_embedding.weight)


def test_the_names_in_the_file_are_the_names_in_the_code(folder: Path) -> None:
    model, _ = learner()
    names = {name for name, _ in model.named_parameters()}
    assert parse_safetensors((folder / MODEL).read_bytes()).keys() == names
    states = parse_safetensors((folder / OPTIMIZER).read_bytes())
    assert {name.rpartition("/")[0] for name in states} == names
    assert {name.rpartition("/")[2] for name in states} == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("file_bytes", [1, 40, 300, 1000, 5000, 10**6])
def test_many_tensors_are_cut_into_files(file_bytes: int, tmp_path: Path) -> None:
    """By whole tensors, in the order of their names; the files are numbered, and together they hold everything."""
    model, optimizer = learner()
    folder = tmp_path / "saved"
    save_learner(folder, model, optimizer, file_bytes=file_bytes)
    for file, tensors in ((MODEL, model.state_dict()), (OPTIMIZER, optimizer_tensors(model, optimizer))):
        stem = file.partition(".")[0]
        paths = sorted(folder.glob(f"{stem}*.safetensors"))
        parts = [parse_safetensors(path.read_bytes()) for path in paths]
        sizes = [[tensor.nbytes for tensor in part.values()] for part in parts]
        assert all(sum(part) <= file_bytes or len(part) == 1 for part in sizes)
        first_of_next = [min(part.items())[1].nbytes for part in parts[1:]]
        assert all(sum(part) + extra > file_bytes for part, extra in zip(sizes, first_of_next, strict=False))
        assert [name for part in parts for name in sorted(part)] == sorted(tensors)
        assert_equal({name: tensor for part in parts for name, tensor in part.items()}, tensors)
        count = len(paths)
        numbered = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert [path.name for path in paths] == (numbered if count > 1 else [file])
        assert (count == 1) == (sum(map(sum, sizes)) <= file_bytes) and (count == len(tensors)) == (file_bytes == 1)


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, in another order in memory."""
    return tensor.T.contiguous().T if tensor.dim() == 2 else tensor


def test_the_files_depend_on_the_tensors_alone(tmp_path: Path) -> None:
    """However a strategy gathered them: in another order, transposed in memory, or as parameters."""
    model, optimizer = learner()
    weights, states = model.state_dict(), optimizer_tensors(model, optimizer)
    forms: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        "plain": dict,
        "backwards": lambda tensors: dict(reversed(tensors.items())),
        "transposed": lambda tensors: {name: transposed(tensor) for name, tensor in tensors.items()},
        "parameters": lambda tensors: {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()},
        "changed": lambda tensors: tensors | {"final_norm.bias": torch.ones(4)},
    }
    for form, arrange in forms.items():
        folder = tmp_path / form
        recipe, tokenizer = to_yaml({"model": to_dict(model.config)}), TOKENIZER
        save(folder, arrange(weights), recipe=recipe, tokenizer=tokenizer, optimizer=arrange(states), file_bytes=300)
    plain, *others, changed = (tree(tmp_path / form) for form in forms)
    assert len(plain) > 10 and others == [plain] * 3 and changed != plain


@pytest.mark.parametrize("piece", [8, 2**24])
def test_a_file_of_tensors_is_the_library_s(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", piece)
    monkeypatch.setattr(manifest, "CACHED_BYTES", 5 * piece)
    path = tmp_path / "x.safetensors"
    tensors = learner()[0].state_dict() | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "\u00e9": torch.ones(1),
    }
    found = save_tensors(path, tensors)
    assert path.read_bytes() == as_safetensors(tensors, {"format": "pt"})
    assert (found.size, found.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    mixed = {
        "a": torch.ones(3, dtype=torch.bool),
        "b": torch.ones(3).bfloat16(),
        "c": torch.arange(3),
        "d": torch.ones(3),
    }
    save_tensors(path, mixed)
    assert_equal(parse_safetensors(path.read_bytes()), mixed)


def test_a_step_folder_is_enough_by_itself(folder: Path, tmp_path: Path) -> None:
    before = weights(folder)
    folder.rename(tmp_path / "elsewhere, ünder another name")
    assert_equal(weights(tmp_path / "elsewhere, ünder another name"), before)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = write(tmp_path, 1)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()} == dict.fromkeys(
        os.listdir(folder), oct(mode)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("final_norm.bias"), ["missing final_norm.bias"]),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), ["left over extra"]),
        (lambda tensors: tensors.update({"final_norm.bias": torch.zeros(5)}), ["final_norm.bias is (5,), not (4,)"]),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_are_listed(change: Callable[[dict[str, Tensor]], object], words: list[str]) -> None:
    model, _ = learner()
    tensors = {name: tensor.clone() for name, tensor in learner(seed=1)[0].state_dict().items()}
    checkpoint.assign_weights(model, dict(tensors), "here")
    change(tensors)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as refused:
        checkpoint.assign_weights(model, tensors, "here")
    assert all(word in str(refused.value) for word in words)
    assert_equal(model.state_dict(), before)


# --- Formats ----------------------------------------------------------------------------------------------------------


def update(model: GPT2, optimizer: torch.optim.Optimizer, token_ids: Tensor) -> None:
    model.train()(token_ids[:, :-1], token_ids[:, 1:]).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_of_each_format_is_read_for_ever(version: int) -> None:
    """Logits, and logits after one more update, are those that the code of format 1 computed."""
    expected = json.loads((GOLDEN / "expected.json").read_text())
    token_ids, wanted = torch.tensor([expected["token_ids"]]), torch.tensor([expected["logits"]])
    loaded = load(GOLDEN / f"format-{version}" / "step-00000002")
    assert verify(loaded.folder).format == version and version <= manifest.FORMAT
    model, tokenizer = loaded.open_model()
    assert tokenizer.decode(tokenizer.encode("What is a checkpoint?")) == "What is a checkpoint?"
    torch.testing.assert_close(model(token_ids).detach(), wanted, atol=2e-5, rtol=0)
    optimizer = make_optimizer(model, OptimConfig(learning_rate=expected["learning_rate"]))
    loaded.load_optimizer(model, optimizer)
    update(model, optimizer, token_ids)
    wanted = torch.tensor([expected["logits_after_one_more_update"]])
    torch.testing.assert_close(model.eval()(token_ids).detach(), wanted, atol=2e-5, rtol=0)
    stranger, _ = loaded.open_model()  # without the optimizer's state
    update(stranger, make_optimizer(stranger, OptimConfig(learning_rate=expected["learning_rate"])), token_ids)
    assert (stranger.eval()(token_ids) - wanted).abs().max() > 0.1


def test_there_is_a_golden_checkpoint_and_a_migration_of_each_format() -> None:
    versions = range(1, manifest.FORMAT + 1)
    present = sorted(path.name for path in GOLDEN.glob("[!.]*"))
    assert present == ["expected.json", *(f"format-{version}" for version in versions)]
    assert sorted(checkpoint.MIGRATIONS) == list(versions)[:-1]


def test_the_state_of_format_1_says_what_format_2_asks() -> None:
    folder = GOLDEN / "format-1" / "step-00000002"
    written, read = json.loads((folder / STATE).read_text()), load(folder).state
    added = {"val_loss": None, "processes": 1, "strategy": "single", "skipped": [], "shift": 0}
    assert not added.keys() & written.keys() and read == written | added
    assert read.keys() == load(GOLDEN / "format-2" / "step-00000002").state.keys()
    assert checkpoint.MIGRATIONS[1]({}) == {}  # an imported model has none


def test_a_newer_format_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / MANIFEST).unlink()
    monkeypatch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
    manifest.write(folder, {}, step=3)
    verify(folder)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"newer format .*Fix: update gpt2lab"):
        verify(folder)


@pytest.mark.parametrize("version", [0, -1, "2", None, True, 2.0])
def test_a_format_that_never_was_is_refused(version: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / MANIFEST).unlink()
    monkeypatch.setattr(manifest, "FORMAT", version)
    manifest.write(folder, {}, step=3)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="there is no format"):
        verify(folder)


# --- Damage -----------------------------------------------------------------------------------------------------------


def assert_found(folder: Path, name: str, content: bytes, what: str) -> None:
    """With another `content`, the folder is refused; with its own again, it is not."""
    path = folder / name
    before = path.read_bytes()
    assert content != before
    path.write_bytes(content)
    try:
        verify(folder)
    except CheckpointError as error:
        found = str(error)
    else:
        found = ""
    path.write_bytes(before)
    assert found.startswith("damaged checkpoint"), f"{what}: {found or 'not noticed'}"


def undetected(folder: Path, bits: int, verified_every: int) -> tuple[int, list[str]]:
    """Change so many bits of every byte of a step folder, one at a time: how many changes, and those not found.

    Each changed file is measured; of the manifest always, else once in a while, the folder is verified whole.
    """
    listed = verify(folder).files
    missed: list[str] = []
    count = 0
    for path in sorted(folder.iterdir()):
        with path.open("rb+", buffering=0) as file:
            for place, byte in enumerate(path.read_bytes()):
                for bit in range(place % 8, place % 8 + bits):
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), place)
                    count += 1
                    whole = path.name == MANIFEST or count % verified_every == 0
                    if is_whole(folder) if whole else manifest.measure(path) == listed[path.name]:
                        missed.append(f"bit {bit % 8} of byte {place} of {path.name}")
                os.pwrite(file.fileno(), bytes([byte]), place)
    return count, missed


def is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError as error:
        return error.what != "damaged checkpoint"
    return True


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """Of every file of a real checkpoint; tests/campaigns/kill_points.py --bits changes every bit."""
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN / "format-2" / "step-00000002", folder)
    count, missed = undetected(folder, 1, verified_every=50)
    assert missed == []
    assert count == sum(path.stat().st_size for path in folder.iterdir()) > 40_000
    assert is_whole(folder)


def test_every_cut_length_is_found(folder: Path) -> None:
    listed, count = verify(folder).files, 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for length in reversed(range(len(content))):
            os.truncate(path, length)
            whole = path.name == MANIFEST or length % 50 == 0
            assert not (is_whole(folder) if whole else manifest.measure(path) == listed[path.name]), (path, length)
            count += 1
        path.write_bytes(content)
    assert count == sum(path.stat().st_size for path in folder.iterdir()) > 5000
    assert is_whole(folder)


def test_changed_white_space_of_the_manifest_is_found(folder: Path) -> None:
    assert_found(folder, MANIFEST, (folder / MANIFEST).read_bytes().replace(b"\n", b" ", 1), "a line end")


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, CONFIG, STATE, MANIFEST, "tokenizer.json"])
def test_every_cut_is_found(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    size = len(content)
    for length in {0, 1, 7, 8, 9, size // 2, size - 4096, size - 64, size - 2, size - 1} & set(range(size)):
        assert_found(folder, name, content[:length], f"{name} cut to {length} bytes")
        assert_found(folder, name, content[:length].ljust(size, b"\0"), f"{name} with zeros from byte {length}")
    assert_found(folder, name, content + b"\0", f"{name} and one byte more")
    assert_found(folder, name, content * 2, f"{name} twice")


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, CONFIG, STATE, MANIFEST, "tokenizer.json"])
def test_a_missing_a_renamed_and_a_foreign_file_is_found(name: str, folder: Path, tmp_path: Path) -> None:
    foreign = (write(tmp_path / "another run", 4, run_id="another run") / name).read_bytes()
    if foreign != (folder / name).read_bytes():  # the settings of the two are the same
        assert_found(folder, name, foreign, f"{name} of another run")
    else:
        assert name in (CONFIG, "tokenizer.json")
    (folder / name).rename(folder / "renamed")
    with pytest.raises(CheckpointError):
        verify(folder)
    (folder / "renamed").rename(folder.parent / name)
    with pytest.raises(CheckpointError):
        verify(folder)
    (folder.parent / name).rename(folder / name)
    verify(folder)


def test_an_extra_file_and_a_folder_in_a_file_s_place_are_found(folder: Path) -> None:
    (folder / "extra").touch()
    with pytest.raises(CheckpointError, match="extra"):
        verify(folder)
    (folder / "extra").unlink()
    (folder / MODEL).unlink()
    (folder / MODEL).mkdir()
    with pytest.raises(CheckpointError):
        verify(folder)


@given(content=st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
def test_any_other_manifest_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(folder)


def test_every_swap_is_found(tmp_path: Path) -> None:
    """Each file in the place of each other, of the same step, another step and another run, parts of weights among them."""
    here = write(tmp_path / "here", 3, file_bytes=1000)
    others = [
        here,
        write(tmp_path / "here", 4, file_bytes=1000),
        write(tmp_path / "there", 3, "there", file_bytes=1000),
    ]
    tried = 0
    for path in sorted(here.iterdir()):
        for foreign in (file for folder in others for file in sorted(folder.iterdir())):
            if foreign.read_bytes() != path.read_bytes():
                assert_found(here, path.name, foreign.read_bytes(), f"{foreign} as {path.name}")
                tried += 1
    assert len(list(here.glob("model-*"))) > 1 and tried > 200
    verify(here)


def test_a_part_that_is_missing_or_foreign_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, file_bytes=1000)
    first, *_, last = sorted(folder.glob("model-*"))
    for change in (
        last.unlink,
        lambda: shutil.copy(first, folder / MODEL),
        lambda: shutil.copy(first, folder / "model-00009-of-00009.safetensors"),
        lambda: last.rename(folder / MODEL),
    ):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        change()
        with pytest.raises(CheckpointError, match="damaged checkpoint"):
            load(folder)
        (folder / MANIFEST).unlink()  # also where somebody signs it
        manifest.write(folder, {}, step=3)
        with pytest.raises(CheckpointError, match="not all the files of the model"):
            load(folder).weights()
        shutil.rmtree(folder)
        folder.mkdir()
        for path, content in before.items():
            path.write_bytes(content)
    load(folder).weights()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / MODEL).unlink()
    os.mkfifo(folder / MODEL)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no file"):
        verify(folder)


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """A store of large files may keep the weights elsewhere; what they hold is verified all the same."""
    before = weights(folder)
    target = (folder / MODEL).rename(tmp_path / "elsewhere")
    (folder / MODEL).symlink_to(target)
    assert_equal(weights(folder), before)
    target.write_bytes(target.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="damaged"):
        verify(folder)
    target.unlink()
    (folder / MODEL).symlink_to(folder / MODEL) if not (folder / MODEL).is_symlink() else None
    with pytest.raises(CheckpointError, match="damaged"):
        verify(folder)


def test_what_was_seen_is_hashed_again_only_when_it_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    measure = manifest.measure

    def noted(path: Path, **how: bool) -> manifest.FileRecord:
        hashed.append(path.name)
        return measure(path, **how)

    monkeypatch.setattr(manifest, "measure", noted)
    seen: manifest.Seen = {}
    verify(folder, seen)
    assert sorted([*hashed, MANIFEST]) == sorted(os.listdir(folder))
    hashed.clear()
    verify(folder, seen)
    assert hashed == []
    path = folder / OPTIMIZER
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    with pytest.raises(CheckpointError, match="damaged"):
        verify(folder, seen)
    assert hashed == [OPTIMIZER]


def test_a_folder_under_another_step_s_name_is_not_that_step(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 1).rename(step_folder(tmp_path, 9))
    newest, troubles = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 5 and len(troubles) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    model, _ = learner()
    with torch.no_grad():
        model.final_norm.bias[0] = value
    for file_bytes in (1, 10**6):
        save_learner(tmp_path / "saved", model, file_bytes=file_bytes)
        with pytest.raises(CheckpointError, match=r"spoilt weights .*: final_norm\.bias have"):
            load(tmp_path / "saved").open_model()


# --- The latest -------------------------------------------------------------------------------------------------------


def test_the_latest_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    assert latest(tmp_path) == (None, [])
    for step in (900, 1000, 99):  # neither by time nor by the length of the number
        write(tmp_path, step)
    (step_folder(tmp_path, 1001).parent / ".step-00001001.part").mkdir()
    newest, troubles = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 1000 and troubles == []
    damaged = step_folder(tmp_path, 1000) / OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1])
    newest, troubles = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 900
    assert_equal(newest.open_model()[0].state_dict(), learner(900)[0].state_dict())
    assert len(troubles) == 1
    assert all(word in troubles[0] for word in ("damaged", "step-00001000", OPTIMIZER, "Fix:"))
    shutil.rmtree(step_folder(tmp_path, 900))
    shutil.rmtree(step_folder(tmp_path, 99))
    newest, troubles = latest(tmp_path)
    assert newest is None and len(troubles) == 1


def test_file_times_decide_nothing(tmp_path: Path) -> None:
    """Clocks jump, and copies have the time of the copy."""
    for number, step in enumerate((30, 10, 40, 20)):
        write(tmp_path, step)
        for path in (step_folder(tmp_path, step), *step_folder(tmp_path, step).iterdir()):
            os.utime(path, (number * 1e9, number * 1e9))
    newest, troubles = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 40 and not troubles
    rotate(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000030", "step-00000040"]
    code = "\n".join(path.read_text() for path in (Path(checkpoint.__file__).parent).rglob("*.py"))
    assert "time.time(" not in code and "getmtime" not in code


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_rotation_keeps_the_newest(keep: int, tmp_path: Path) -> None:
    for step in (1, 9, 10, 11):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "mine").mkdir()
    kept = [1, 9, 10, 11][-keep:]
    before = {name: value for name, value in tree(tmp_path).items() if int(name.split("/")[1][5:]) in kept}
    rotate(tmp_path, keep)
    assert tree(tmp_path) == before
    assert (tmp_path / "checkpoints" / "mine").is_dir()


def test_rotation_never_removes_the_last_that_is_whole(tmp_path: Path) -> None:
    """A run whose newest checkpoints are damaged goes on from an older one, and saves: that must be kept."""
    for step in (1, 5, 8, 9):
        write(tmp_path, step)
    for step in (8, 9):
        (step_folder(tmp_path, step) / STATE).write_text("{}")
    rotate(tmp_path, 2)
    newest, _ = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 5


# --- Death ------------------------------------------------------------------------------------------------------------

DONE, DIED, RAISED, SURVIVED = 0, 9, 3, 4
OPERATIONS = frozenset(["open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "fsync"])


def in_a_child(work: Callable[[], None], at: Callable[[str], None] = lambda _: None) -> int:
    """Do `work` in a forked process; return its exit code. `at` is called at each operation and after each opening."""
    pid = os.fork()
    if pid == 0:
        fsync = os.fsync

        def counted_fsync(handle: int) -> None:
            at("fsync")
            fsync(handle)

        def opened(_frame: object, event: str, function: Any) -> None:
            if event == "c_return" and function.__name__ == "open":  # a file is there, and still empty
                at("opened")

        try:
            os.fsync = counted_fsync
            sys.addaudithook(lambda event, _: at(event) if event in OPERATIONS else None)
            sys.setprofile(opened)
            work()
            os._exit(DONE)
        except (OSError, LabError):
            os._exit(RAISED)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_each_operation(work: Callable[[], None], act: Callable[[], None], every: int = 1) -> Iterator[int]:
    """Do `work` again and again in a child that acts at its first operation, its second...; yield the exit codes.

    `every` leaves some out, for work of many operations.
    """
    for number in itertools.count(1, every):
        counter = itertools.count(1)

        def at(_: str, number: int = number, counter: Iterator[int] = counter) -> None:
            if next(counter) == number:
                act()

        def watched(number: int = number, counter: Iterator[int] = counter) -> None:
            work()
            if next(counter) > number:  # an error at an operation that may fail, such as removing what is not there
                os._exit(SURVIVED)

        code = in_a_child(watched, at)
        yield code
        if code == DONE:
            return


def die() -> None:
    os._exit(DIED)


def run_out_of_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("act", "seen"), [(die, DIED), (run_out_of_disk, RAISED)], ids=["killed", "disk full"])
def test_a_writer_may_stop_at_any_operation(act: Callable[[], None], seen: int, tmp_path: Path) -> None:
    """Save a third checkpoint and rotate: whatever happens, the latest is the second or the third, and whole."""
    run, spare = tmp_path / "run", tmp_path / "spare"
    old, new = learner(2)[0].state_dict(), learner(3)[0].state_dict()
    write(spare, 1), write(spare, 2)
    step_folder(spare, 2).with_name(".step-00000003.part").mkdir()  # what an earlier death left
    found: list[int] = []

    def work() -> None:
        write(run, 3)
        rotate(run, 2)

    shutil.copytree(spare, run)
    for code in at_each_operation(work, act):
        assert code in ((seen, DONE) if act is die else (seen, DONE, SURVIVED))
        newest, troubles = latest(run)
        assert newest is not None and troubles == []
        assert_equal(newest.open_model()[0].state_dict(), {2: old, 3: new}[newest.state["step"]])
        assert newest.state["step"] == 3 or code == seen
        found += [newest.state["step"]] if code == seen else []
        # The next start goes on from there, and leaves nothing behind.
        sweep(run)
        write(run, 3)
        rotate(run, 2)
        assert sorted(os.listdir(run / "checkpoints")) == ["step-00000002", "step-00000003"]
        shutil.rmtree(run)
        shutil.copytree(spare, run)
    print(f"{len(found)} operations; the new checkpoint counts from operation {found.index(3) + 1} on")
    assert found == sorted(found)
    assert len(found) > 20 and 10 < found.index(3) < len(found)


@pytest.mark.parametrize("limit", [1, 100, 1000, 3000, 5000])
def test_a_writer_may_die_in_the_middle_of_a_file(limit: int, tmp_path: Path) -> None:
    """The kernel kills it (SIGXFSZ) when a file grows beyond `limit` bytes."""
    before = weights(write(tmp_path, 2))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write(tmp_path, 3)

    assert in_a_child(work) == -signal.SIGXFSZ
    newest, troubles = latest(tmp_path)
    assert newest is not None and newest.state["step"] == 2 and troubles == []
    assert_equal(newest.open_model()[0].state_dict(), before)
    write(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000002", "step-00000003"]


def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power loss: each file and its folder are synced, then renamed, then the folder above is synced."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        order.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    folder = write(tmp_path, 3)
    *inside, aside, renamed, above = order
    assert len(inside) > 5
    assert sorted(inside) == sorted(os.listdir(folder))
    assert (aside, renamed, above) == (".step-00000003.part", "rename", "checkpoints")


# --- Nothing in it can run --------------------------------------------------------------------------------------------


def holds_a_pickle(content: bytes) -> bool:
    """Whether a file is a pickle, or an archive that may hold one."""
    if content.startswith((b"PK", b"\x1f\x8b")) or b"ustar" in content[:512]:
        return True
    try:
        return sum(1 for _ in pickletools.genops(content)) > 1
    except Exception:  # whatever it says, no unpickler would get further
        return False


def test_no_file_of_a_run_is_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2LAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(sentences())
    values = SETTINGS | {"steps": 2, "data.source": str(tmp_path / "text.txt"), "out": str(tmp_path / "run")}
    train(load_config([], flags(values)), Witness().console)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if holds_a_pickle(path.read_bytes())]
    archive = io.BytesIO()
    torch.save({"step": 1}, archive)
    for control in (archive.getvalue(), pickle.dumps({"step": 1}), pickle.dumps([1], protocol=0)):
        assert holds_a_pickle(control)
