"""The loop: an interrupted run is the run that was not, to the bit; what may not change training does not."""

import hashlib
import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from gpt2lab import checkpoint, cli
from gpt2lab.config import RunConfig
from gpt2lab.errors import CheckpointError, Interrupted, LabError, NumbersError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.recipe import load_config
from gpt2lab.strategy import Single
from gpt2lab.tracking import Console
from gpt2lab.train import train
from gpt2lab.weights import open_model

pytestmark = pytest.mark.usefixtures("workplace")

STEPS = 20
MODEL: dict[str, Any] = {
    "model.max_seq_len": 16,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.dropout": 0.1,
}
SETTINGS: dict[str, Any] = MODEL | {
    "tokenizer": "chars",
    "steps": STEPS,
    "batch_tokens": 64,
    "micro_batch": 2,
    "seq_len": 16,
    "validate_every": 4,
    "checkpoint_every": 6,
    "sample_every": 7,
    "sample_prompt": "the ",
    "optim.learning_rate": 1e-2,
    "data.validation_tokens": 200,
    "system.device": "cpu",
    "system.precision": "fp32",
}
"""A run of a second: two micro-batches a step, with dropout, validated, sampled and saved at different steps."""

EXPERTS: dict[str, Any] = {"model_num_experts": 4, "model_experts_per_token": 2, "model_ff_hidden_dim": 32}
"""Changes that make it a run with experts."""

MEASURED = {"tokens_per_second", "elapsed_seconds", "peak_memory_bytes", "mfu"}
"""What no two runs have in common."""


def sentences(count: int = 400, seed: int = 0) -> str:
    """Text with a little to learn in it."""
    random = Random(seed)
    subjects, verbs, objects = ("the cat", "a dog", "my aunt"), ("sees", "likes", "feeds"), ("birds.", "mice.", "me.")
    return "\n".join(" ".join(map(random.choice, (subjects, verbs, objects))) for _ in range(count))


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={json.dumps(value)}" for key, value in settings.items()]


class Witness:
    """A console's stream. It acts once the line of a step appears: the step is done, and nothing of it is saved yet."""

    def __init__(self, step: int | None = None, act: Callable[[], Any] = lambda: None) -> None:
        self.step, self.act, self.text = step, act, ""

    def write(self, text: str) -> None:
        self.text += text
        if self.step is not None and re.search(rf"step +{self.step}/", text):
            self.step = None
            self.act()

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False

    @property
    def console(self) -> Console:
        return Console(self, every_seconds=0)


class Crash(BaseException):
    """The end of the process, as seen from inside: nothing that follows is run."""


def crash() -> None:
    raise Crash


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what no two runs have in common."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def state(folder: Path) -> dict[str, Tensor]:
    """Weights and optimizer state of the latest checkpoint."""
    newest, troubles = checkpoint.latest(folder)
    assert newest is not None and not troubles
    model, optimizer = (
        parse_safetensors(bytes(newest.read(name))) for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)
    )
    return model | optimizer


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), f"{name} differs by {(tensor - theirs[name]).abs().max():.3g}"


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def text(workplace: Path) -> Path:
    """What the runs learn from."""
    return workplace / "text.txt"


Go = Callable[..., Path]


@pytest.fixture(scope="module")
def go(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Train in a folder (a new one, if none is given) with some settings changed; return the folder."""

    def start(folder: Path | None = None, witness: Witness | None = None, **changes: Any) -> Path:
        out = str(folder or tmp_path_factory.mktemp("run") / "run")
        return train(settings(out=out, text=text, **changes), (witness or Witness()).console)

    return start


def settings(*, out: str, text: Path, **changes: Any) -> RunConfig:
    """SETTINGS with changes: ``optim_name="sgd"`` is ``optim.name=sgd``; None takes a setting back."""
    keys = {re.sub(r"^(model|optim|data|system)_", r"\1.", name): value for name, value in changes.items()}
    values = SETTINGS | {"out": out, "data.source": str(text)} | keys
    return load_config([], flags({key: value for key, value in values.items() if value is not None}))


@pytest.fixture(scope="module")
def whole(go: Go) -> Path:
    """The run that nothing interrupts. Read only."""
    return go()


# --- Resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "seen"), [(terminate, Interrupted), (crash, Crash)], ids=["signal", "crash"])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_that_was_stopped_is_the_run_that_was_not(
    step: int, act: Callable[[], None], seen: type[BaseException], go: Go, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(seen):
        go(folder, Witness(step, act))
    assert rows(folder) == rows(whole)[: step + 1]
    saved = step if act is terminate else step - 1 - (step - 1) % 6
    newest, _ = checkpoint.latest(folder)
    assert (newest.state["step"] if newest else 0) == max(0, saved)
    go(folder)
    assert rows(folder) == rows(whole)
    assert_equal(state(folder), state(whole))
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_a_run_that_was_stopped_again_and_again_is_the_run_that_was_not(
    changes: dict[str, Any], go: Go, whole: Path, tmp_path: Path
) -> None:
    truth = go(**changes) if changes else whole
    for step, act in [(2, crash), (3, terminate), (4, terminate), (11, crash), (12, terminate), (19, crash)]:
        with pytest.raises((Interrupted, Crash)):
            go(tmp_path / "run", Witness(step, act), **changes)
    go(tmp_path / "run", **changes)
    assert rows(tmp_path / "run") == rows(truth)
    assert_equal(state(tmp_path / "run"), state(truth))


def test_control_another_seed_is_another_run(go: Go, whole: Path) -> None:
    other = go(seed=1338)
    assert all(ours != theirs for ours, theirs in zip(rows(other), rows(whole), strict=True))
    assert not any(torch.equal(tensor, state(whole)[name]) for name, tensor in state(other).items() if tensor.dim() > 1)


def test_control_a_resumed_run_without_its_optimizer_is_another_run(
    go: Go, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        go(tmp_path / "run", Witness(9, terminate))
    monkeypatch.setattr(Single, "load_optimizer", lambda *_: None)
    go(tmp_path / "run")
    assert rows(tmp_path / "run")[:11] == rows(whole)[:11]  # step 10 starts from the same weights
    assert rows(tmp_path / "run")[11:] != rows(whole)[11:]


def test_a_stop_says_where_it_stopped_and_what_to_do(go: Go, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"SIGTERM \(.*run\): 7 of 20 steps are done and saved. Fix: .*again") as stop:
        go(tmp_path / "run", Witness(7, terminate))
    assert stop.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was


def test_a_complete_run_is_left_alone(go: Go, whole: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, witness = tree(whole), Witness()
    go(whole, witness)
    assert "nothing left to do" in witness.text
    values = SETTINGS | {"out": str(whole), "data.source": str(text)}
    assert cli.run(["train", *flags(values), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["step"] == STEPS and row["run"] == str(whole)
    assert tree(whole) == before


def test_a_moved_run_goes_on(go: Go, whole: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        go(tmp_path / "here", Witness(9, terminate))
    (tmp_path / "there").mkdir()
    (tmp_path / "here").rename(tmp_path / "there" / "run")
    copy = tmp_path / "copy.txt"  # the same text in another place is the same text
    copy.write_bytes(text.read_bytes())
    go(tmp_path / "there" / "run", data_source=str(copy))
    assert rows(tmp_path / "there" / "run") == rows(whole)
    assert_equal(state(tmp_path / "there" / "run"), state(whole))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, ["seed 1337 is now 1"]),
        ({"steps": 21}, ["steps 20 is now 21"]),
        ({"batch_tokens": 128}, ["batch_tokens 64 is now 128"]),
        ({"seq_len": 8}, ["seq_len 16 is now 8"]),
        ({"model_embed_dim": 64}, ["model.embed_dim 32 is now 64"]),
        ({"model_position": "rope"}, ["model.position 'learned' is now 'rope'"]),
        ({"optim_name": "sgd", "optim_clip": 2}, ["optim.name 'adamw' is now 'sgd'", "optim.clip 1.0 is now 2.0"]),
        ({"tokenizer": "bytes"}, ["tokenizer 'chars' is now 'bytes'"]),
    ],
    ids=str,
)
def test_another_configuration_is_refused(changes: dict[str, Any], words: list[str], go: Go, whole: Path) -> None:
    before = tree(whole)
    with pytest.raises(CheckpointError, match="another configuration") as refused:
        go(whole, **changes)
    assert all(word in str(refused.value) for word in words), refused.value
    assert tree(whole) == before


def test_another_text_is_refused(go: Go, whole: Path, tmp_path: Path) -> None:
    other, before = tmp_path / "other.txt", tree(whole)
    other.write_text(sentences(seed=1))
    with pytest.raises(CheckpointError, match="other text"):
        go(whole, data_source=str(other))
    assert tree(whole) == before


@pytest.mark.parametrize("name", ["run", "config", "tokenizer", "state", "manifest", "metrics"])
def test_a_run_may_die_in_the_middle_of_a_file(
    name: str, go: Go, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time that it writes a file of this name, whatever its ending, half of it gets onto the disk."""

    def half(write: Callable[..., int]) -> Callable[..., int]:
        def torn(path: Path, content: Any, **arguments: Any) -> int:
            if path.stem != name:
                return write(path, content, **arguments)
            write(path, content[: len(content) // 2], **arguments)
            raise Crash

        return torn

    if name == "metrics":  # is rewritten when a run goes on
        with pytest.raises(Crash):
            go(tmp_path / "run", Witness(9, crash))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half(Path.write_text))
        patch.setattr(Path, "write_bytes", half(Path.write_bytes))
        with pytest.raises(Crash):
            go(tmp_path / "run")
    go(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole)
    assert_equal(state(tmp_path / "run"), state(whole))


def test_what_a_dead_writer_left_is_swept_at_the_start(go: Go, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        go(tmp_path / "run", Witness(9, terminate))
    (tmp_path / "run" / "checkpoints" / ".step-00000010.part").mkdir()
    go(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


# --- What does not decide what is learned -----------------------------------------------------------------------------


def test_how_often_it_is_validated_sampled_and_saved_changes_nothing(go: Go, whole: Path) -> None:
    for every in (0, 1, 7):
        other = go(validate_every=every, sample_every=every, checkpoint_every=every)
        assert_equal(state(other), state(whole))
        measured = [row["step"] for row in rows(other) if "val_loss" in row]
        assert measured == [step for step in range(STEPS + 1) if step in (0, STEPS) or (every and step % every == 0)]
        for ours, theirs in zip(rows(other), rows(whole), strict=True):
            assert all(ours[key] == theirs[key] for key in ours.keys() & theirs.keys())


def test_accumulation_changes_nothing_but_rounding(go: Go) -> None:
    def losses(micro_batch: int, dropout: float) -> list[float]:
        folder = go(steps=8, micro_batch=micro_batch, model_dropout=dropout)
        return [row["loss"] for row in rows(folder) if "loss" in row]

    one, two, four = (losses(micro_batch, 0.0) for micro_batch in (1, 2, 4))
    assert one == pytest.approx(four, abs=1e-6)
    assert two == pytest.approx(four, abs=1e-6)
    # Dropout is drawn for each micro-batch, so with it one sees that the steps were really split.
    assert min(abs(a - b) for a, b in zip(losses(1, 0.1), losses(4, 0.1), strict=True)) > 1e-5


def test_dropout_is_drawn_anew_for_each_step_and_micro_batch(go: Go) -> None:
    """... and for the same ones in the same way."""

    def masks() -> list[str]:
        found: list[str] = []

        def note(module: nn.Module, _: Any, output: Tensor) -> None:
            if isinstance(module, nn.Dropout) and module.training:
                found.append(hashlib.sha256((output == 0).numpy().tobytes()).hexdigest())

        hook = nn.modules.module.register_module_forward_hook(note)
        go(steps=3, micro_batch=2, model_dropout=0.5)
        hook.remove()
        return found

    assert len(set(masks())) == len(masks()) == 3 * 2 * 5  # steps, micro-batches, places
    assert masks() == masks()


# --- It learns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"system_precision": "bf16"},
        {"optim_name": "sgd", "optim_learning_rate": 0.3},
        {"model_position": "rope", "model_num_kv_heads": 1, "model_windows": [4, None]},
        EXPERTS | {"model_activation": "swiglu", "model_norm": "rmsnorm", "model_bias": False, "model_tie_head": False},
        {"optim_clip": 0, "tokenizer": "bytes"},
    ],
    ids=str,
)
def test_the_loss_goes_down(changes: dict[str, Any], go: Go) -> None:
    first, *_, last = rows(go(steps=100, batch_tokens=128, model_dropout=0, validate_every=0, **changes))
    print(f"validation: {first['val_loss']:.2f}, then {last['val_loss']:.2f}")
    letters = sentences().encode()
    by_frequency = -sum(n / len(letters) * math.log(n / len(letters)) for n in map(letters.count, set(letters)))
    assert last["val_loss"] < by_frequency - 0.3 < first["val_loss"]


def test_settings_that_decide_what_is_learned_do(go: Go, whole: Path) -> None:
    """The runs above were not all the same one."""
    changes = ({}, {"system_precision": "bf16"}, {"optim_name": "sgd"}, {"model_position": "rope"}, {"optim_clip": 0})
    changes += (EXPERTS, EXPERTS | {"optim_balance_weight": 1}, EXPERTS | {"optim_z_weight": 1})
    losses = {rows(go(steps=4, **change))[-1]["loss"] for change in changes}
    assert len(losses) == len(changes)


def test_metrics_have_one_row_a_step(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(STEPS + 1))
    assert all(row["tokens"] == row["step"] * SETTINGS["batch_tokens"] for row in lines)
    always = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "elapsed_seconds"}
    validated = {"val_loss", "val_perplexity", "peak_memory_bytes"}
    for row in lines[1:]:
        assert always <= row.keys()
        assert (validated <= row.keys()) == (row["step"] % 4 == 0)
        assert all(math.isfinite(value) for value in row.values())
    assert lines[0]["val_perplexity"] == pytest.approx(math.exp(lines[0]["val_loss"]))
    elapsed = [row["elapsed_seconds"] for row in lines[1:]]
    assert elapsed == sorted(elapsed)
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [7, 14, 20]


def test_what_a_run_needs_to_be_started_again_is_in_its_folder(whole: Path, tmp_path: Path) -> None:
    """Its config.yaml is a recipe, names no folder of its own, and gives the same run."""
    recipe = (whole / "config.yaml").read_text()
    assert str(whole.parent) not in recipe
    again = train(load_config([str(whole / "config.yaml")], [f"--out={tmp_path / 'again'}"]), Witness().console)
    assert_equal(state(again), state(whole))


def test_no_file_of_a_run_names_the_folder_it_is_in(whole: Path) -> None:
    named = [path for path in whole.rglob("*") if path.is_file() and str(whole).encode() in path.read_bytes()]
    assert named == []


def test_a_text_that_changes_before_the_first_checkpoint_is_not_forgotten(go: Go, tmp_path: Path) -> None:
    """Either it is refused, or the run's own settings name the text that the run learned from."""
    other = tmp_path / "other.txt"
    other.write_text(sentences(seed=1))
    with pytest.raises(Crash):
        go(tmp_path / "run", Witness(2, crash))
    try:
        go(tmp_path / "run", data_source=str(other))
    except CheckpointError:
        return
    assert load_config([str(tmp_path / "run" / "config.yaml")]).data.source == str(other)


# --- Going on from another model --------------------------------------------------------------------------------------

BORROWED = dict.fromkeys([key.replace(".", "_") for key in MODEL]) | {"tokenizer": None}
"""What a run that starts from another model takes from it."""


def test_init_from_starts_from_those_weights(go: Go, whole: Path) -> None:
    tuned = go(init_from=str(whole), steps=3, seed=7, **BORROWED)
    first = rows(tuned)[0]
    assert first["val_loss"] == rows(whole)[-1]["val_loss"]
    assert first["val_loss"] < rows(whole)[0]["val_loss"] - 0.5  # a new model starts elsewhere
    (ours, our_tokenizer), (theirs, their_tokenizer) = open_model(str(tuned)), open_model(str(whole))
    assert ours.config == theirs.config
    assert our_tokenizer.fingerprint == their_tokenizer.fingerprint
    assert state(tuned).keys() == state(whole).keys()


def test_a_run_that_started_from_another_model_goes_on(go: Go, whole: Path, tmp_path: Path) -> None:
    def tune(name: str, witness: Witness | None = None) -> Path:
        return go(tmp_path / name, witness, init_from=str(whole), steps=6, **BORROWED)

    with pytest.raises(Interrupted):
        tune("stopped", Witness(3, terminate))
    assert_equal(state(tune("stopped")), state(tune("at once")))


# --- Bad numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_it_before_they_do_harm(
    where: str, go: Go, whole: Path, tmp_path: Path
) -> None:
    folder, calls = tmp_path / "run", 0

    def poison(module: nn.Module, _: Any, losses: Tensor) -> Tensor | None:
        nonlocal calls
        if not isinstance(module, GPT2) or not module.training:
            return None
        calls += 1
        if calls != 2 * 10:  # the second micro-batch of step 10
            return None
        if where == "loss":
            return losses * math.inf
        losses.register_hook(lambda gradient: gradient * math.nan)
        return None

    hook = nn.modules.module.register_module_forward_hook(poison)
    try:
        with pytest.raises(NumbersError, match="step 10") as bad:
            go(folder, skip_limit=0)
    finally:
        hook.remove()
    assert bad.value.exit_code == 7
    newest, troubles = checkpoint.latest(folder)
    assert newest is not None and newest.state["step"] == 6 and not troubles
    assert rows(folder)[:10] == rows(whole)[:10] and rows(folder)[10]["loss"] is None and len(rows(folder)) == 11
    go(folder)
    assert rows(folder) == rows(whole)
    assert_equal(state(folder), state(whole))


def test_an_absurd_learning_rate_is_noticed(go: Go, tmp_path: Path) -> None:
    with pytest.raises(NumbersError, match=r"Fix: lower optim.learning_rate"):
        go(tmp_path / "run", optim_learning_rate=1e30, optim_clip=0)


# --- Refused before anything is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_prompt": "Ü"},
        {"sample_prompt": ""},
        {"sample_prompt": "a" * 17},
        {"model_vocab_size": 5},
        {"seq_len": 8192, "model_max_seq_len": 8192, "batch_tokens": 16384},
        {"init_from": "nowhere"},
        {"data_validation": "nowhere"},
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_what_cannot_work_is_refused_at_the_start(changes: dict[str, Any], go: Go, tmp_path: Path) -> None:
    with pytest.raises(LabError):
        go(tmp_path / "run", steps=3, **changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_is_refused_before_the_text_is_prepared(go: Go, text: Path, tmp_path: Path) -> None:
    fresh, prepared = tmp_path / "fresh.txt", text.parent / "cache" / "prepared"
    fresh.write_text(sentences(seed=2))
    before = set(prepared.iterdir())
    with pytest.raises(LabError, match="cannot write to the folder"):
        go(fresh / "run", data_source=str(fresh))
    assert set(prepared.iterdir()) == before


# --- Experts ----------------------------------------------------------------------------------------------------------

OF_ROUTERS = {"balance_loss", "router_z_loss", "expert_counts"}


def trained_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "loss" in row]


def test_metrics_say_what_the_routers_did(go: Go, whole: Path) -> None:
    found = trained_rows(go(**EXPERTS))
    assert len(found) == STEPS
    for row in found:
        assert row.keys() >= OF_ROUTERS
        assert [len(counts) for counts in row["expert_counts"]] == [4, 4]  # layers, experts
        assert [sum(counts) for counts in row["expert_counts"]] == [64 * 2, 64 * 2]  # of a step, all micro-batches
        # Two experts that always win are half of all work each: 4 * (1/2 * p + 1/2 * q), with p + q at most 1.
        assert 0.5 < row["balance_loss"] <= 2 and row["router_z_loss"] > 0
    assert found[0]["balance_loss"] == pytest.approx(1, abs=0.1)  # first routers are hardly sure of anything
    assert found[0]["router_z_loss"] == pytest.approx(math.log(4) ** 2, rel=0.05)
    assert len({json.dumps(row["expert_counts"]) for row in found}) > 1
    assert not any(OF_ROUTERS & row.keys() for row in rows(whole)), "a dense model has no routers"


def test_the_loss_that_is_reported_is_the_cross_entropy_alone(go: Go) -> None:
    """What keeps routers even moves the weights, and is no part of how well the text was guessed."""

    def guesses(**changes: Any) -> tuple[list[float], list[dict[str, Any]], dict[str, Tensor]]:
        """The mean of the losses that the model gave for each step's tokens; the metrics; the weights."""
        found: list[Tensor] = []

        def note(module: nn.Module, _: Any, losses: Tensor) -> None:
            if isinstance(module, GPT2) and module.training:
                found.append(losses.detach())

        hook = nn.modules.module.register_module_forward_hook(note)
        try:
            folder = go(steps=3, model_dropout=0, optim_clip=0, **EXPERTS | changes)
        finally:
            hook.remove()
        means = [torch.cat(found[i : i + 2]).mean().item() for i in range(0, len(found), 2)]
        return means, trained_rows(folder), state(folder)

    without = guesses(optim_balance_weight=0, optim_z_weight=0)
    for means, metrics, weights in (without, guesses(optim_balance_weight=100), guesses(optim_z_weight=100)):
        assert [row["loss"] for row in metrics] == pytest.approx(means, rel=1e-6) and len(means) == 3
        assert metrics[0]["loss"] == without[1][0]["loss"]
        if metrics is not without[1]:
            assert metrics[0]["grad_norm"] > 2 * without[1][0]["grad_norm"]
            assert not torch.equal(weights["blocks.0.mlp.router.weight"], without[2]["blocks.0.mlp.router.weight"])


def test_accumulation_changes_nothing_with_experts_but_how_even_they_are_kept(go: Go) -> None:
    """Cross-entropy and z-loss are means over tokens; the balance is of each micro-batch, so its mean knows the split."""

    def split(micro_batch: int, balance_weight: float) -> list[dict[str, Any]]:
        changes = {"steps": 8, "model_dropout": 0, "optim_balance_weight": balance_weight, "optim_z_weight": 1}
        return trained_rows(go(micro_batch=micro_batch, **EXPERTS | changes))

    one, four = split(1, 0), split(4, 0)
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in four], abs=1e-6)
    assert [row["expert_counts"] for row in one] == [row["expert_counts"] for row in four]
    assert [row["router_z_loss"] for row in one] == pytest.approx([row["router_z_loss"] for row in four], rel=1e-5)
    assert one[0]["balance_loss"] > four[0]["balance_loss"] + 1e-4, "were the steps split at all?"
    uneven = [abs(a["loss"] - b["loss"]) for a, b in zip(split(1, 1), split(4, 1), strict=True)]
    assert uneven[0] < 1e-6 < max(uneven)


def test_the_balancing_loss_balances(go: Go) -> None:
    """With it, the busiest expert has little more than its share; left alone, one expert a token learns no balance."""

    def busiest(weight: float) -> float:
        """How many times its share the busiest expert of a layer had, in the last ten steps."""
        changes = EXPERTS | {"model_experts_per_token": 1, "model_dropout": 0, "optim_learning_rate": 3e-3}
        folder = go(steps=30, validate_every=0, optim_balance_weight=weight, optim_z_weight=0, **changes)
        counts = torch.tensor([row["expert_counts"] for row in trained_rows(folder)[-10:]]).sum(0)
        return (counts.max(dim=1).values / counts.double().mean(dim=1)).max().item()

    left_alone, balanced = busiest(0), busiest(1)
    print(f"the busiest of four experts has {left_alone:.2f} of its share left alone, {balanced:.2f} balanced")
    assert balanced < 1.5 < 1.8 < left_alone
