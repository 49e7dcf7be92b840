"""Numbers that go bad: a step is skipped everywhere or nowhere, a jump of the loss is seen, a broken replica is found."""

import hashlib
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt2lab import checkpoint
from gpt2lab import train as training
from gpt2lab.data.batches import Batches
from gpt2lab.errors import NumbersError
from gpt2lab.health import FEWEST_LOSSES, SKIPS_WITHIN, Health, is_bad, refuse_differing_replicas
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.run import Run
from tests.forked import Before, fork_command, patch
from tests.test_distributed import BASE
from tests.test_train import flags, rows, sentences

pytestmark = pytest.mark.usefixtures("workplace", "short_samples")

HEALTH: dict[str, Any] = BASE | {"validate_every": 0, "micro_batch": 2, "system.compare_every": 1, "model.dropout": 0}
"""Four passes a step, so that two ranks have two each, and replicas are compared after every step."""


def go(place: Path, processes: int, strategy: str, before: Before | None = None, code: int = 0, **changes: Any) -> str:
    """Train; every process ends with the same exit code. Return all that was said."""
    values = HEALTH | {"system.strategy": strategy} | changes
    with fork_command(processes, ["train", *flags(values)], place, before) as ranks:
        assert ranks.wait() == [code] * processes, ranks.everything_said
        return ranks.everything_said


def in_step(act: Callable[[Run, Callable[[Run], dict[str, Any]]], dict[str, Any]]) -> None:
    """Let `act` do what a training step does; it is given the real step."""
    step = training.train_step
    patch(training, "train_step", lambda run: act(run, step))


def strict(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, which must be JSON: NaN and Infinity are none."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- Steps that are not finite ----------------------------------------------------------------------------------------

POISONED = {3: "token_embedding", 5: "blocks.0", 7: "blocks.1", 9: "loss", 11: "gradient"}
"""Where, in which step, one number becomes NaN."""


def poison(at_rank: int) -> Before:
    """Spoil one number in the second pass of one rank, in each of the poisoned steps; keep digests of the weights."""

    def before(rank: int) -> None:
        now = {"step": 0, "pass": 0}
        names: dict[nn.Module, str] = {}

        def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            where = POISONED.get(now["step"])
            whole = isinstance(module, GPT2)
            if rank != at_rank or not module.training:
                return None
            now["pass"] += whole
            if where is None or now["pass"] + (not whole) != 2:  # a whole model ends its pass, its parts come before
                return None
            if whole and where == "gradient":
                output.register_hook(lambda gradient: gradient * math.nan)
            elif names.get(module) == where or (whole and where == "loss"):
                mask = torch.zeros_like(output)
                mask.view(-1)[0] = math.nan
                return output + mask
            return None

        def step(run: Run, real: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
            now.update({"step": run.step, "pass": 0})
            names.update((module, name) for name, module in run.model.named_modules())
            digests = [weights_now(run)]
            row = real(run)
            digests.append(weights_now(run))
            with Path(f"digests-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([run.step, *digests]) + "\n")
            return row

        nn.modules.module.register_module_forward_hook(spoil)
        in_step(step)

    return before


def weights_now(run: Run) -> str:
    """A digest of what this process holds of the weights."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in run.model.parameters()]
    # Of copies: a tensor that NumPy has seen cannot be resized, which FSDP does.
    return hashlib.sha256(b"".join(p.detach().clone().numpy().tobytes() for p in local)).hexdigest()


@pytest.mark.parametrize(("processes", "strategy", "at_rank"), [(1, "single", 0), (2, "ddp", 1), (2, "fsdp", 1)])
def test_a_step_that_is_not_finite_is_skipped_by_all(processes: int, strategy: str, at_rank: int, place: Path) -> None:
    said = go(place, processes, strategy, poison(at_rank), steps=12)
    written = strict(place / "run" / "metrics.jsonl")
    assert [row["step"] for row in written if "skipped" in row] == list(POISONED)
    assert all((row["loss"] is None) == (row["grad_norm"] is None) == ("skipped" in row) for row in written[1:])
    assert said.count(" skipped: ") == len(POISONED)
    for rank in range(processes):
        digests = [json.loads(line) for line in (place / f"digests-{rank}.jsonl").read_text().splitlines()]
        assert [step for step, before, after in digests if before == after] == list(POISONED)
    bad = strict(place / "run" / "bad_batches.jsonl")
    assert [row["step"] for row in bad] == list(POISONED)
    text = sentences()
    for row in bad:
        spoilt = [] if POISONED[row["step"]] == "gradient" else [1 * processes + at_rank]
        assert row["micro_batches_not_finite"] == spoilt
        shown = [n for number in spoilt for n in range(2 * number, 2 * number + 2)] or list(range(8))
        assert list(row["text"]) == [str(n) for n in shown] and len(row["sample_starts"]) == 8
        # chars makes one token of a letter, and the text that is learned from is the start of the file
        assert all(row["text"][str(n)] == text[row["sample_starts"][n] :][:17] for n in shown)


def test_too_many_skipped_steps_end_it_and_it_can_go_on(place: Path) -> None:
    changes = {"steps": 12, "skip_limit": 2, "checkpoint_every": 1}
    said = go(place, 2, "ddp", poison(0), code=7, **changes)
    [line] = [line for line in said.splitlines() if line.startswith("gpt2lab: ")]
    assert "of the last 100 steps 3 were skipped (3, 5, 7); 2 may be" in line and "Fix: " in line
    newest, troubles = checkpoint.latest(place / "run")
    assert newest is not None and newest.state["step"] == 6 and newest.state["skipped"] == [3, 5] and not troubles
    assert all(tensor.isfinite().all() for tensor in newest.weights().values())
    again = go(place, 2, "ddp", poison(0), code=7, **changes)
    assert "3 were skipped (3, 5, 7)" in again, "what was skipped before counts after"
    go(place, 2, "ddp", **changes)
    assert [row["step"] for row in rows(place / "run")] == list(range(13))


def test_skipped_steps_count_within_a_window() -> None:
    health = Health()
    for step in range(1, 4 * SKIPS_WITHIN):
        health.note({"step": step, "loss": None if step % 50 == 0 else 1.0, "skipped": step % 50 == 0 and "nan"})
        health.refuse_too_many_skips(2, "here")
    assert len(health.skipped) == 2
    with pytest.raises(NumbersError, match=r"of the last 100 steps 2 were skipped .*; 1 may be"):
        health.refuse_too_many_skips(1, "here")


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "bad"),
    [
        (1.0, 1.0, False, False),
        (math.nan, 1.0, False, True),
        (math.inf, 1.0, True, True),
        (1.0, math.nan, False, True),
        (1.0, math.inf, False, True),
        (1.0, math.inf, True, False),
    ],
)
def test_what_is_bad(loss: float, norm: float, scaled: bool, bad: bool) -> None:
    assert is_bad(loss, norm, scaled=scaled) == bad


# --- Jumps of the loss ------------------------------------------------------------------------------------------------


def falling(count: int, noise: float, seed: int = 0) -> list[float]:
    """A loss that falls as one does, with noise."""
    draw = np.random.default_rng(seed)
    return [1 + 2 * math.exp(-step / 100) + float(draw.normal(0, noise)) for step in range(count)]


def spikes(losses: list[float]) -> list[int]:
    health, found = Health(), []
    for step, loss in enumerate(losses, start=1):
        if health.spike(loss) is not None:
            found.append(step)
        health.note({"step": step, "loss": loss})
    return found


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.1])
def test_a_jump_stands_out_and_noise_does_not(noise: float) -> None:
    losses = [falling(1000, noise, seed) for seed in range(3)]
    assert [spikes(one) for one in losses] == [[], [], []]
    for one in losses:
        one[500] += 10 * noise
        assert spikes(one) == [501]


def test_the_first_losses_are_never_a_spike() -> None:
    assert spikes([3.0] * (FEWEST_LOSSES - 1) + [100.0]) == []
    assert spikes([3.0] * FEWEST_LOSSES + [100.0]) == [FEWEST_LOSSES + 1]


def test_health_is_a_function_of_the_rows() -> None:
    losses = enumerate(falling(SKIPS_WITHIN, 0.01), start=1)
    written = [
        {"step": n, "loss": loss} if n % 10 else {"step": n, "loss": None, "skipped": "nan"} for n, loss in losses
    ]
    noted = Health()
    for row in written:
        noted.note(row)
    assert vars(Health(written)) == vars(noted) and len(noted.skipped) == 10
    assert Health(written).spike(9.0) == noted.spike(9.0) is not None


def burst(rank: int) -> None:
    """A learning rate a hundred times too large, in steps 30 to 34."""
    rate = training.learning_rate
    patch(training, "learning_rate", lambda step, *rest: rate(step, *rest) * (100 if 30 <= step < 35 else 1))


def babble(*indices: int) -> Before:
    """Batches that are random letters."""

    def before(rank: int) -> None:
        draw = Batches.__call__

        def spoilt(batches: Batches, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
            token_ids, targets = draw(batches, step, micro_step)
            if step in indices:
                letters = np.random.default_rng((step, batches.number(micro_step)))
                token_ids, targets = (
                    torch.from_numpy(letters.integers(0, 23, ids.shape)) for ids in (token_ids, targets)
                )
            return token_ids, targets

        patch(Batches, "__call__", spoilt)

    return before


def noted_spikes(run: Path) -> list[int]:
    return [row["step"] for row in rows(run) if "spike" in row]


@pytest.mark.parametrize(
    ("before", "earliest", "latest"), [(burst, 30, 35), (babble(39), 40, 40)], ids=["rate", "text"]
)
def test_a_jump_is_noticed_within_five_steps(before: Before, earliest: int, latest: int, place: Path) -> None:
    said = go(place, 2, "ddp", before, steps=45)
    first = noted_spikes(place / "run")[0]
    assert earliest <= first <= latest
    assert f"step {first}: loss " in said and "deviations above the last ones" in said


def test_a_clean_run_has_no_jumps(place: Path) -> None:
    said = go(place, 2, "ddp", steps=100)
    assert noted_spikes(place / "run") == [] and "spike" not in said


BACK: dict[str, Any] = {"steps": 40, "checkpoint_every": 10, "keep_checkpoints": 9, "on_spike": "rollback"}


@pytest.mark.parametrize(("processes", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp")])
def test_a_rollback_goes_on_past_the_text(processes: int, strategy: str, place: Path) -> None:
    """Batch 24 is babble: step 25 jumps, the run returns to step 20 and leaves the five batches since then out."""
    said = go(place, processes, strategy, babble(24), **BACK)
    assert said.count("is a spike; back to step 20") == 1
    written = rows(place / "run")
    assert [row["step"] for row in written] == list(range(41))
    assert [row.get("shift", 0) for row in written] == [0] * 21 + [5] * 20
    [note] = strict(place / "run" / "bad_batches.jsonl")
    assert note["step"] == 25 and note["back_to"] == 20 and note["reason"].startswith("spike")
    newest, _ = checkpoint.latest(place / "run")
    assert newest is not None and newest.state["shift"] == 5
    assert noted_spikes(place / "run") == [] and written[-1]["loss"] < written[20]["loss"]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_rolled_back_can_be_resumed(kind: signal.Signals, place: Path) -> None:
    """Stopped after the rollback and before the next checkpoint; killed, it finds the same jump again."""
    spoil = babble(24)
    go(place, 2, "ddp", spoil, out="whole", **BACK)

    def before(rank: int) -> None:
        spoil(rank)

        def step(run: Run, real: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
            row = real(run)
            if run.step == 23 and run.shift:
                signal.raise_signal(kind)
            return row

        in_step(step)

    go(place, 2, "ddp", before, code=75 if kind == signal.SIGTERM else -kind, **BACK)
    go(place, 2, "ddp", spoil, **BACK)
    assert rows(place / "run") == rows(place / "whole")


def test_a_jump_that_no_rollback_cures_is_noted_and_trained_through(place: Path) -> None:
    said = go(place, 1, "single", babble(*range(24, 60)), **BACK)
    assert said.count("back to step 20") == 3
    assert noted_spikes(place / "run")[0] > 20 and len(rows(place / "run")) == 41


# --- Replicas ---------------------------------------------------------------------------------------------------------


def flip(at_rank: int, after_step: int, bit: int) -> Before:
    """Flip one bit of one weight."""

    def before(rank: int) -> None:
        def step(run: Run, real: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
            row = real(run)
            if rank == at_rank and run.step == after_step:
                weight = run.model.layers[1].mlp.up_proj.weight.detach()
                weight.view(-1).view(torch.int32)[1000] ^= 1 << bit
            return row

        in_step(step)

    return before


@pytest.mark.parametrize(
    ("processes", "at_rank", "after_step", "bit", "named"),
    [(3, 2, 6, 0, "rank 2"), (3, 0, 4, 20, "rank 0"), (2, 1, 5, 31, "ranks [0, 1]")],
)
def test_a_flipped_bit_is_found_at_the_next_comparison(
    processes: int, at_rank: int, after_step: int, bit: int, named: str, place: Path
) -> None:
    """The lowest bit is flipped right before: an update may round it away."""
    changes = {"steps": 9, "system.compare_every": 3, "checkpoint_every": 3}
    said = go(place, processes, "ddp", flip(at_rank, after_step, bit), code=7, **changes)
    [line] = [line for line in said.splitlines() if line.startswith("gpt2lab: ")]
    assert f"after step 6 the weights of {named} are not those of the others" in line and "Fix: " in line
    newest, _ = checkpoint.latest(place / "run")
    assert newest is not None and newest.state["step"] == 3, "what may be wrong is not saved"


def test_control_a_flipped_bit_nobody_looks_for_is_not_found(place: Path) -> None:
    go(place, 2, "ddp", flip(1, 4, 20), **{"steps": 9, "system.compare_every": 0})


def test_only_replicas_of_one_shard_are_compared() -> None:
    refuse_differing_replicas(["0:a", "1:b", "0:a", "1:b"], 7)
    refuse_differing_replicas(["0:a", "1:b", "2:c"], 7)
    with pytest.raises(NumbersError, match=r"after step 7 the weights of ranks \[1, 3\]"):
        refuse_differing_replicas(["0:a", "1:b", "0:a", "1:c"], 7)
    with pytest.raises(NumbersError, match=r"rank 0, rank 5 are"):
        refuse_differing_replicas(["0:x", "1:b", "0:a", "1:b", "0:a", "1:c"], 7)
