"""Several processes are one process: the same losses, the same samples, the same files, whatever the strategy.

Each rank is a real process with its own gloo connections (tests/forked.py).
"""

import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpt2lab import checkpoint
from gpt2lab.config import ResolvedConfig
from gpt2lab.data.batches import Batches
from gpt2lab.distributed import join
from gpt2lab.errors import ConfigError
from gpt2lab.evaluate import scoring
from gpt2lab.recipe import load_config
from gpt2lab.run import Run, set_up
from gpt2lab.strategy import Replicas, Single, check_strategy, choose_strategy
from gpt2lab.system import StopSignals
from gpt2lab.tracking import Console
from gpt2lab.train import loop, train_step
from tests.campaigns import resume
from tests.forked import Before, Forked, fork_command, in_pass, patch
from tests.test_train import SETTINGS, assert_equal, flags, rows, state, terminate, tree

pytestmark = pytest.mark.usefixtures("workplace", "short_samples")

STEPS = 50
BASE: dict[str, Any] = SETTINGS | {
    "steps": STEPS,
    "batch_tokens": 128,
    "data.source": "text.txt",
    "out": "run",
    "validate_every": 25,
    "checkpoint_every": 0,
    "sample_every": 0,
    "system.compare_every": 10,
}
"""Eight samples a step, so that two processes share them evenly and three do not."""

MODELS: dict[str, dict[str, Any]] = {
    "dropout, 4 passes": {"micro_batch": 1},
    "experts, 1 pass": {
        "micro_batch": 4,
        "model.num_experts": 4,
        "model.experts_per_token": 2,
        "model.ff_hidden_dim": 32,
    },
    "rope, windows, groups, own head": {
        "micro_batch": 2,
        "model.position": "rope",
        "model.windows": [4, None],
        "model.num_kv_heads": 1,
        "model.tie_head": False,
        "model.norm": "rmsnorm",
    },
}
WAYS = [
    ("dropout, 4 passes", 2, "ddp"),
    ("dropout, 4 passes", 3, "ddp"),
    ("dropout, 4 passes", 2, "fsdp"),
    ("experts, 1 pass", 2, "ddp"),
    ("experts, 1 pass", 3, "fsdp"),
    ("rope, windows, groups, own head", 3, "ddp"),
    ("rope, windows, groups, own head", 2, "fsdp"),
]
LOSS_WITHIN, NORM_WITHIN = 1e-6, 1e-5


def go(place: Path, processes: int = 1, strategy: str = "auto", before: Before | None = None, **changes: Any) -> Path:
    """Train in so many processes; return the run folder."""
    values = BASE | {"system.strategy": strategy} | changes
    with fork_command(processes, ["train", *flags(values)], place, before) as ranks:
        assert ranks.wait() == [0] * processes, ranks.everything_said
    return place / values["out"]


def with_run(work: Callable[[Run, StopSignals], Any], **changes: Any) -> Callable[[int], Any]:
    """`work` with a run that is set up, in each rank."""

    def in_rank(rank: int) -> Any:
        config = load_config([], flags(BASE | changes))
        with StopSignals() as stop, join(config, stop) as ranks:
            run = set_up(config, Console(quiet=True), ranks)
            try:
                return work(run, stop)
            finally:
                run.close()

    return in_rank


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) if key in a or key in b]
    assert len(pairs) > 2
    return max(abs(a - b) for a, b in pairs)


# --- The same run -----------------------------------------------------------------------------------------------------


def small_passes(rank: int) -> None:
    """Validation in 13 passes, which neither two nor three processes share evenly."""
    patch(scoring, "_LOGIT_NUMBERS", 1 << 9)


@pytest.fixture(scope="module")
def alone(workplace: Path) -> Callable[[str], Path]:
    """The run of a model in one process."""
    made: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in made:
            made[model] = go(workplace, before=small_passes, out=f"alone-{len(made)}", **MODELS[model])
        return made[model]

    return run


@pytest.mark.parametrize(("model", "processes", "strategy"), WAYS)
def test_several_processes_learn_what_one_does(
    model: str, processes: int, strategy: str, alone: Callable[[str], Path], place: Path
) -> None:
    ours, theirs = rows(go(place, processes, strategy, small_passes, **MODELS[model])), rows(alone(model))
    assert len(ours) == STEPS + 1
    differences = {key: largest_difference(ours, theirs, key) for key in ("loss", "grad_norm", "val_loss")}
    print(differences)
    assert differences["loss"] < LOSS_WITHIN
    assert differences["grad_norm"] < NORM_WITHIN
    assert differences["val_loss"] < LOSS_WITHIN
    for key in ("step", "tokens", "learning_rate", "expert_counts"):
        assert [row.get(key) for row in ours] == [row.get(key) for row in theirs]


def mean_in_place_of_sum(rank: int) -> None:
    """The usual mistake: DDP's mean over processes, of gradients that should be added."""
    patch(Replicas, "backward", Single.backward)


def one_rank_learns_the_others_text(rank: int) -> None:
    patch(Batches, "number", lambda batches, micro_step: micro_step * batches.world_size)


def masks_of_the_rank(rank: int) -> None:
    seed = torch.manual_seed
    patch(torch, "manual_seed", lambda number: seed(number + rank))


@pytest.mark.parametrize(
    "fault", [mean_in_place_of_sum, one_rank_learns_the_others_text, masks_of_the_rank], ids=lambda f: f.__name__
)
def test_control_a_fault_in_the_sharing_shows(fault: Before, alone: Callable[[str], Path], place: Path) -> None:
    model = "dropout, 4 passes"
    ours = rows(go(place, 2, "ddp", before=fault, **MODELS[model] | {"steps": 5}))
    worst = max(largest_difference(ours, rows(alone(model))[:6], key) for key in ("loss", "grad_norm"))
    assert worst > 100 * NORM_WITHIN


def test_recomputed_blocks_give_the_same_bits(place: Path) -> None:
    changes = MODELS["experts, 1 pass"] | {"steps": 8, "model.dropout": 0.2}
    for processes, strategy in ((1, "single"), (2, "ddp"), (2, "fsdp")):
        kept = go(place, processes, strategy, out=f"kept-{strategy}", **changes)
        again = go(
            place, processes, strategy, out=f"again-{strategy}", **changes | {"system.activation_checkpointing": True}
        )
        assert rows(again) == rows(kept)
        assert_equal(state(again), state(kept))


# --- What shares it ---------------------------------------------------------------------------------------------------


def describe(run: Run, stop: StopSignals) -> dict[str, Any]:
    """What wraps the model, and how much of everything this process holds."""
    run.step = 1
    train_step(run)
    parameters = list(run.model.parameters())
    moments = [kept[key] for kept in run.strategy.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]

    def here(tensors: Any) -> int:
        return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)

    return {
        "type": type(run.strategy.module).__name__,
        "ddp": isinstance(run.strategy.module, DistributedDataParallel),
        "fsdp": [name for name, part in run.model.named_modules() if isinstance(part, FSDPModule)],
        "sharded": all(isinstance(t, DTensor) for t in [*parameters, *moments]),
        "whole": sum(p.numel() for p in parameters),
        "weights": here(parameters),
        "moments": here(moments),
        "names": [name for name, _ in run.model.named_parameters()],
    }


def test_each_strategy_wraps_and_shares_out_what_it_says(place: Path) -> None:
    names = None
    for processes, strategy in ((1, "single"), (2, "ddp"), (2, "fsdp"), (3, "fsdp")):
        changes = {"system.strategy": strategy, "out": f"run-{strategy}-{processes}"}
        with Forked(processes, with_run(describe, **changes), place) as ranks:
            said = ranks.results()
        for one in said:
            assert one["ddp"] == (strategy == "ddp")
            assert one["fsdp"] == (["", "blocks.0", "blocks.1"] if strategy == "fsdp" else [])
            assert one["sharded"] == (strategy == "fsdp")
            share = processes if strategy == "fsdp" else 1
            assert one["weights"] == pytest.approx(one["whole"] / share, rel=0.05 * (share - 1))
            assert one["moments"] == 2 * one["weights"]
            names = names or one["names"]
            assert one["names"] == names
        assert said[0]["type"] == {"single": "GPT2", "ddp": "DistributedDataParallel", "fsdp": "FSDPGPT2"}[strategy]
        if strategy == "fsdp":
            assert sum(one["weights"] for one in said) == said[0]["whole"]


def count_reductions(run: Run, stop: StopSignals) -> int:
    """How many of DDP's buckets meet in three steps."""
    buckets: list[int] = []

    def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets.append(bucket.index())
        return allreduce_hook(group, bucket)

    run.strategy.module.register_comm_hook(dist.group.WORLD, hook)
    loop(run, stop)
    return len(buckets)


def test_gradients_meet_once_a_step_however_many_passes_it_has(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = itertools.count()

    def reductions(micro_batch: int) -> int:
        work = with_run(count_reductions, steps=3, micro_batch=micro_batch, out=f"run-{next(number)}")
        with Forked(2, work, place) as ranks:
            counts = ranks.results()
        assert counts[0] == counts[1]
        return int(counts[0])

    one, four = reductions(micro_batch=4), reductions(micro_batch=1)
    assert one == four >= 3

    def meet_in_each(strategy: Replicas, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(Replicas, "one_pass", meet_in_each)
    assert reductions(micro_batch=1) == 4 * one, "the control"


# --- Changed in the middle --------------------------------------------------------------------------------------------


def note_samples(rank: int) -> None:
    """Write down where each sample begins that this rank learns from: a line a step."""
    draw = Batches.__call__

    def noted(batches: Batches, step: int, micro_step: int) -> Any:
        drawn = draw(batches, step, micro_step)
        first = batches.number(micro_step) * batches.micro_batch
        if bool((drawn[1] >= 0).all()):
            with Path(f"samples-{rank}.jsonl").open("a") as file:
                starts = [batches.samples.start(index) for index in batches.indices(step, micro_step)]
                file.writelines(
                    json.dumps([step, first + place, start, drawn[0][place, :3].tolist()]) + "\n"
                    for place, start in enumerate(starts)
                )
        return drawn

    patch(Batches, "__call__", noted)


def samples(place: Path) -> list[Any]:
    """What all ranks learned from, in the order of the steps and of the samples in them."""
    lines = [line for path in place.glob("samples-*.jsonl") for line in path.read_text().splitlines()]
    return sorted(json.loads(line) for line in lines)


Sitting = tuple[int, str, int]
"""Processes, strategy and micro_batch, for six steps of a run."""
SITTING_STEPS = 6
CHAIN: list[Sitting] = [(1, "single", 4), (2, "ddp", 2), (2, "fsdp", 1), (3, "ddp", 2), (3, "fsdp", 1), (1, "auto", 8)]
EXACT_CHAIN: list[Sitting] = [(2, "fsdp", 2), (3, "ddp", 2), (1, "single", 2), (3, "fsdp", 2), (2, "ddp", 2)]


def stop_after(step: int) -> Before:
    """Note the samples, and make rank 0 get a SIGTERM in a step, which all of them then end."""
    stop = in_pass(0, step, 0, terminate)

    def before(rank: int) -> None:
        note_samples(rank)
        stop(rank)

    return before


def sit_through(place: Path, sittings: list[Sitting], **changes: Any) -> Path:
    """Train one run in several sittings, each on other processes; return its folder."""
    for number, (processes, strategy, micro_batch) in enumerate(sittings, start=1):
        values = BASE | changes | {"micro_batch": micro_batch, "system.strategy": strategy}
        with fork_command(processes, ["train", *flags(values)], place, stop_after(number * SITTING_STEPS)) as ranks:
            assert ranks.wait() == [75 if number < len(sittings) else 0] * processes, ranks.everything_said
        newest, _ = checkpoint.latest(place / "run")
        assert newest is not None
        assert [newest.state[key] for key in ("step", "processes")] == [number * SITTING_STEPS, processes]
    return place / "run"


@pytest.fixture
def places(workplace: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the text."""
    for name in ("whole", "chain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").symlink_to(workplace / "text.txt")
    return tmp_path / "whole", tmp_path / "chain"


def test_a_run_goes_on_with_other_processes_strategies_and_passes(places: tuple[Path, Path]) -> None:
    """The rate is small, so that what rounding does is not made larger by forty steps."""
    whole, chain = places
    steps = SITTING_STEPS * len(CHAIN)
    changes = {"steps": steps, "model.dropout": 0, "optim.learning_rate": 1e-4}
    theirs = rows(go(whole, before=note_samples, **changes))
    ours = rows(sit_through(chain, CHAIN, **changes))
    assert samples(chain) == samples(whole) and len(samples(whole)) == 8 * steps
    assert largest_difference(ours, theirs, "loss") < LOSS_WITHIN
    assert largest_difference(ours, theirs, "grad_norm") < NORM_WITHIN


def test_an_exact_run_goes_on_with_other_processes_and_strategies_to_the_same_bits(places: tuple[Path, Path]) -> None:
    whole, chain = places
    changes = MODELS["rope, windows, groups, own head"] | {"steps": SITTING_STEPS * len(EXACT_CHAIN)}
    exact = changes | {"system.exact": True}
    truth, ours = go(whole, **exact), sit_through(chain, EXACT_CHAIN, **exact)
    assert rows(ours) == rows(truth)
    last = exact["steps"]
    assert hashes(checkpoint.step_folder(ours, last)) == hashes(checkpoint.step_folder(truth, last))
    plain = go(whole, 3, "ddp", out="plain", **changes)
    assert rows(plain)[:7] != rows(truth)[:7], "the control: without it, three processes round otherwise"


# --- The same files ---------------------------------------------------------------------------------------------------


def save_again(run: Run, stop: StopSignals) -> None:
    """Write what was loaded as another checkpoint, without a step between."""
    weights, optimizer = run.strategy.weights(), run.strategy.optimizer_state()
    if run.ranks.main:
        checkpoint.save(
            Path(f"again-{run.config.system.strategy}-{run.ranks.world_size}"),
            weights,
            recipe="{}",
            tokenizer=run.tokenizer,
            optimizer=optimizer,
            state={},
        )


def hashes(folder: Path) -> list[str]:
    """Of the weights and of the optimizer's state."""
    return [tree(folder)[name] for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_strategy_writes_the_same_files(optimizer: str, place: Path) -> None:
    changes = {"steps": 3, "optim.name": optimizer, "model.tie_head": False}
    run = go(place, 2, "fsdp", **changes)
    truth = hashes(checkpoint.step_folder(run, 3))
    for processes, strategy in ((1, "single"), (1, "fsdp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp")):
        work = with_run(save_again, **changes | {"system.strategy": strategy})
        with Forked(processes, work, place) as ranks:
            ranks.results()
        assert hashes(place / f"again-{strategy}-{processes}") == truth


def test_every_strategy_s_checkpoint_has_the_same_tensors(place: Path) -> None:
    def header(run: Path, name: str) -> list[Any]:
        with safe_open(checkpoint.step_folder(run, 2) / name, "pt") as file:
            return [(key, file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()]  # noqa: SIM118

    def headers(processes: int, strategy: str) -> list[list[Any]]:
        run = go(place, processes, strategy, out=f"{strategy}-{processes}", **MODELS["experts, 1 pass"] | {"steps": 2})
        return [header(run, name) for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)]

    alone = headers(1, "single")
    assert headers(2, "ddp") == headers(2, "fsdp") == alone and len(alone[1]) == 3 * len(alone[0])


# --- What cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "world_size", "device", "word"),
    [
        ({"strategy": "ddp", "shard_size": 2}, 4, "cpu", "shard_size"),
        ({"strategy": "fsdp", "shard_size": 3}, 4, "cpu", "shard_size"),
        ({"strategy": "fsdp", "shard_size": 2, "exact": True}, 4, "cpu", "exact"),
        ({"strategy": "fsdp", "offload": True}, 2, "cpu", "offload"),
        ({"strategy": "ddp", "offload": True}, 2, "cuda", "offload"),
        ({"strategy": "fsdp", "precision": "fp16"}, 2, "cuda", "fp16"),
        ({"strategy": "single", "precision": "fp16", "exact": True}, 1, "cuda", "fp16"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], world_size: int, device: str, word: str
) -> None:
    words = flags({f"system.{key}": value for key, value in settings.items()})
    with pytest.raises(ConfigError, match=word):
        check_strategy(resolved(words), world_size, device)
    [strategy] = [word for word in words if "strategy" in word]
    check_strategy(resolved([strategy]), world_size, device)


def resolved(words: list[str]) -> ResolvedConfig:
    config = load_config([], words)
    return ResolvedConfig(system=config.system)


def test_auto_chooses_by_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_strategy("auto", world) for world in (1, 2, 8)] == ["single", "ddp", "ddp"]
    assert choose_strategy("fsdp", 1) == "fsdp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert choose_strategy("auto", 2) == "fsdp" and choose_strategy("ddp", 2) == "ddp"


# --- Resumed at every step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [("ddp", 2, 0.1, 4), ("fsdp", 2, 0.1, 1)], ids=resume.name_of)
def test_each_checkpoint_gives_the_next_byte_for_byte(cell: resume.Cell, tmp_path: Path) -> None:
    """The short one of tests/campaigns/resume.py."""
    assert resume.try_cell(cell, 8, tmp_path) == []


def test_control_a_resume_without_the_optimizer_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Single, "load_optimizer", lambda *_: None)
    assert resume.try_cell(("ddp", 2, 0.1, 1), 4, tmp_path) == [1, 2, 3]
