"""One recipe on one process and on several, by every way to start them: the same curve, and what each way costs.

Each way trains in processes and a run folder of its own, started as a user would; what is compared are the metrics.jsonl that
the runs leave behind, and the weights in their last checkpoints.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gpt2lab
from gpt2lab import checkpoint, exact
from gpt2lab.bench.timing import (
    Measured,
    Round,
    at_least,
    environment,
    rate,
    spread,
    strangers_cpu_seconds,
    write_result,
)
from gpt2lab.config import RunConfig
from gpt2lab.errors import ConfigError, ProcessError
from gpt2lab.folder import check_folder, read_about, read_stored
from gpt2lab.recipe import load_config
from gpt2lab.system import choose_device
from gpt2lab.tracking import Console, read_rows

RECIPE = """\
# Six passes a step, so that two and three processes share them evenly and four do not; with dropout.
batch_tokens: 1536
micro_batch: 4
seq_len: 64
tokenizer: bytes
model: {preset: tiny-64, dropout: 0.1}
optim: {learning_rate: 1e-3}
data: {source: TEXT, validation_tokens: 4096}
system: {device: cpu, precision: fp32}
"""
"""What is trained where no recipe is given, on the source of this package."""
GOALS = {"loss": 1e-6, "grad_norm": 1e-5}
"""How far a step of a run may be from the same step in one process."""
SHOWN_EVERY, LABEL = 5, 20
FIRST_STEPS = 1
"""Steps left out of the speed: memory is allocated, connections are made."""

_PYTHON = [sys.executable, "-m"]
LAUNCHERS: dict[str, Callable[[int], list[str]]] = {
    "gpt2lab": lambda processes: [],
    "torchrun": lambda processes: ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"],
    "accelerate launch": lambda processes: [
        "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m",
    ],
}  # fmt: skip
"""What stands between ``python -m`` and ``gpt2lab``, for so many processes on one machine."""


@dataclass(frozen=True)
class StrategiesBench:
    """What is compared.

    Attributes:
        recipe: None: a small model on the source of this package, fp32 on the CPU.
        processes: of ddp and fsdp; exact sums are tried on up to twice as many.
        rounds: of which the median counts, for the cost of exact sums.
        out: the folder for the runs and strategies.json.
    """

    recipe: str | None = None
    steps: int = 50
    processes: int = 2
    rounds: int = 5
    out: str = "runs/bench-strategies"


@dataclass(frozen=True)
class Way:
    """How a recipe is trained.

    Attributes:
        launcher: one of `LAUNCHERS`.
    """

    strategy: str = "single"
    processes: int = 1
    launcher: str = "gpt2lab"
    exact: bool = False

    @property
    def name(self) -> str:
        """For a table, and for a folder."""
        words = [self.strategy, str(self.processes)] if self.strategy != "single" else ["single"]
        return " ".join([*words, *[self.launcher] * (self.launcher != "gpt2lab"), *["exact"] * self.exact])

    def command(self, recipe: Path, steps: int, out: Path) -> list[str]:
        """What a user would type, with nothing saved before the end."""
        counted = [f"--system.num_processes={self.processes}"] if self.launcher == "gpt2lab" else []
        settings = [f"--system.strategy={self.strategy}", f"--system.exact={str(self.exact).lower()}", *counted]
        settings += [f"--steps={steps}", f"--out={out}", "--checkpoint_every=0", "--validate_every=0"]
        return [*_PYTHON, *LAUNCHERS[self.launcher](self.processes), "gpt2lab", "train", str(recipe), *settings]


SINGLE = Way()


def bench_strategies(settings: StrategiesBench, console: Console) -> dict[str, Any]:
    """Train the recipe every way; write strategies.json into `out`.

    Returns:
        What is in strategies.json: ``machine``, ``rows`` and ``ratios``, and all that they were made from.

    Raises:
        ConfigError: settings that cannot work. ProcessError: a run failed.
    """
    at_least(1, steps=settings.steps - FIRST_STEPS, rounds=settings.rounds)
    at_least(2, processes=settings.processes)
    folder = Path(settings.out)
    check_folder(folder)
    if (folder / "runs").exists():
        cause, fix = "it has the runs of an earlier benchmark", "give another with --out"
        raise ConfigError("folder in use", where=str(folder), cause=cause, fix=fix)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(folder) if settings.recipe is None else Path(settings.recipe)
    device = choose_device(load_config([str(recipe)]).system.device)
    torch.set_num_threads(1)  # as each process has, so that the machine is described as it was used
    bench = Bench(recipe, settings.steps, folder / "runs", console)

    count = settings.processes
    ways = [SINGLE, Way("ddp", count), Way("fsdp", count)]
    ways += [Way("ddp", count, launcher) for launcher in LAUNCHERS if launcher != "gpt2lab"]
    runs = {way: bench.train(way) for way in ways}
    most = 2 * count if device.type == "cpu" else min(2 * count, torch.cuda.device_count())
    exact_ways = [Way(kind, n, exact=True) for kind in ("ddp", "fsdp") for n in range(1 + (kind == "fsdp"), most + 1)]
    digests = {way.name: digest(bench.train(way)) for way in exact_ways}
    measured = bench.rounds([Way(*which, exact=on) for which in (("single", 1), ("ddp", count)) for on in (False, True)],
                            settings.rounds)  # fmt: skip
    costs = {f"time of exact over not, {way.name}": spread(measured.ratios(f"{way.name} exact", way.name))
             for way in (SINGLE, Way("ddp", count))}  # fmt: skip
    config = read_stored(runs[SINGLE])
    assert config is not None
    result = environment(device, config.system.precision) | {
        "settings": asdict(settings),
        "recipe": RECIPE if settings.recipe is None else recipe.read_text(encoding="utf-8"),
        "rows": [row(way, run, runs[SINGLE], config) for way, run in runs.items()],
        "goals": GOALS,
        "curves": {way.name: [line["loss"] for line in steps_of(run)] for way, run in runs.items()},
        "exact": [{"who": name, "digest": value} for name, value in digests.items()],
        "ratios": {name: cost["median"] for name, cost in costs.items()},
        "ranges": {name: [cost["low"], cost["high"]] for name, cost in costs.items()},
        "rounds": asdict(measured) | {"remark": measured.remark()},
    }
    write_result(folder / "strategies.json", result)
    return result


class Bench:
    """Runs of one recipe, each in processes and a folder of its own, with one thread a process, as torchrun has it."""

    def __init__(self, recipe: Path, steps: int, folder: Path, console: Console) -> None:
        self.recipe, self.steps, self.folder, self.console = recipe, steps, folder, console

    def train(self, way: Way, again: str = "") -> Path:
        """Train one way; return the run folder.

        Raises:
            ProcessError: it failed, or ran in another way than it was told.
        """
        self.console.say(f"{way.name}{again}: {self.steps} steps")
        out = self.folder / f"{way.name}{again}".replace(" ", "-")
        command = way.command(self.recipe, self.steps, out)
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("gpt2lab: ")] or [done.stderr[-500:]]
            raise ProcessError(
                "a run failed", where=way.name, cause=said[0], fix="give its command: " + " ".join(command)
            )
        [sitting] = read_about(out)["sittings"]
        if (sitting["strategy"], sitting["processes"], sitting["exact"]) != (way.strategy, way.processes, way.exact):
            cause = f"it ran as {sitting['strategy']} on {sitting['processes']}, exact {sitting['exact']}"
            raise ProcessError(
                "a run was another", where=way.name, cause=cause, fix="report it: a launcher was not heard"
            )
        return out

    def rounds(self, ways: Sequence[Way], rounds: int) -> Measured:
        """The median seconds of a step, each way in turn, round after round; all rounds count."""
        kept = []
        for number in range(1, rounds + 1):
            others, started = strangers_cpu_seconds(), time.perf_counter()
            runs = {way.name: self.train(way, f" round {number}") for way in ways}
            seconds = {name: statistics.median(step_seconds(run)) for name, run in runs.items()}
            available, after = (time.perf_counter() - started) * (os.cpu_count() or 1), strangers_cpu_seconds()
            share = None if others is None or after is None else max(0.0, after - others) / available
            kept.append(Round(seconds, share))
        return Measured(kept, [])


def write_recipe(folder: Path) -> Path:
    """The recipe of our own, with its text beside it: a copy, so that all runs read the same."""
    sources = sorted(Path(gpt2lab.__file__).parent.rglob("*.py"))
    text, recipe = folder / "text.txt", folder / "recipe.yaml"
    text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sources), encoding="utf-8")
    recipe.write_text(RECIPE.replace("TEXT", f'"{text.absolute()}"'), encoding="utf-8")
    return recipe


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's steps."""
    return [line for line in read_rows(run / "metrics.jsonl") if line["step"]]


def step_seconds(run: Path) -> list[float]:
    """Of each step but the first."""
    ends = [line["elapsed_seconds"] for line in steps_of(run)]
    return [end - start for start, end in zip(ends[FIRST_STEPS - 1 :], ends[FIRST_STEPS:], strict=False)]


def differences(run: Path, other: Path) -> dict[str, float]:
    """The largest difference of any step, in loss and in gradient norm."""
    pairs = list(zip(steps_of(run), steps_of(other), strict=True))
    return {key: max(abs(ours[key] - theirs[key]) for ours, theirs in pairs) for key in GOALS}


def row(way: Way, run: Path, single: Path, config: RunConfig) -> dict[str, Any]:
    """One row of the result: speed, and how far the run is from that of one process."""
    what = f"{way.strategy} on {way.processes}, started by {way.launcher}"
    return rate(way.name, what, config.batch_tokens, step_seconds(run)) | {"differences": differences(run, single)}


def digest(run: Path) -> str:
    """Of the weights a run ended with."""
    last, _ = checkpoint.latest(run)
    assert last is not None
    return exact.digest(last.weights())


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal: the curves side by side, below each what it is compared by."""
    rows, curves, settings = result["rows"], result["curves"], result["settings"]
    width = max(len(entry["who"]) for entry in rows) + 2
    lines = [result["machine"], f"{settings['steps']} steps, one thread a process; loss of each step", ""]
    lines.append(f"{'step':<{LABEL}}" + "".join(f"{name:>{width}}" for name in curves))
    for step in range(SHOWN_EVERY, settings["steps"] + 1, SHOWN_EVERY):
        lines.append(f"{step:<{LABEL}}" + "".join(f"{losses[step - 1]:>{width}.7f}" for losses in curves.values()))
    lines.append("")
    for key, goal in GOALS.items():
        found = [entry["differences"][key] for entry in rows]
        met = "yes" if max(found) <= goal else "NO"
        cells = "".join(f"{value:>{width}.1e}" for value in found)
        lines.append(f"{f'|{key} - single|':<{LABEL}}" + cells + f"   within {goal:g}: {met}")
    lines.append(f"{'tokens/s':<{LABEL}}" + "".join(f"{entry['tokens_per_second']:>{width},.0f}" for entry in rows))
    kinds = {entry["digest"] for entry in result["exact"]}
    lines += ["", f"exact: {'the same weights' if len(kinds) == 1 else f'{len(kinds)} DIFFERENT weights'} to the bit"]
    lines += [f"  {entry['who']:<16} {entry['digest'][:16]}" for entry in result["exact"]]
    for name, cost in result["ratios"].items():
        low, high = result["ranges"][name]
        lines.append(f"{name}: {cost:.2f} ({low:.2f} to {high:.2f}), median of {settings['rounds']} rounds in turn")
    return "\n".join([*lines, *filter(None, [result["rounds"]["remark"]])])
