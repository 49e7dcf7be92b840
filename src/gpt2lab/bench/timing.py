"""How every benchmark measures: the things it compares take turns, round by round, and a disturbed round does not count.

Machines are shared, and their speed drifts: a time by itself means little. A ratio of two times from one round does.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2lab.errors import ConfigError
from gpt2lab.paths import write_whole
from gpt2lab.system import describe_machine

QUIET = 0.05
"""Share of the CPU time that others may take during a round. One busy process beside two threads of ours takes half."""
ATTEMPTS = 3
"""Rounds tried for each one wanted, at most."""
TURN_SECONDS = 0.2
"""A turn repeats its step for so long: the system counts CPU time in hundredths of a second."""
STAT = Path("/proc/stat")
"""Where Linux counts what its cores do."""


@dataclass(frozen=True)
class Round:
    """One turn of each of the things compared.

    Attributes:
        seconds: of one step, the mean over its turn, by name.
        others: share of the machine's CPU time that other processes took meanwhile; None where nothing tells.
    """

    seconds: dict[str, float]
    others: float | None

    @property
    def disturbed(self) -> bool:
        """Whether others were at work."""
        return self.others is not None and self.others > QUIET


@dataclass(frozen=True)
class Measured:
    """The rounds that count, and those that do not.

    Attributes:
        kept: the undisturbed rounds; where there were too few in so many attempts, the least disturbed.
        dropped: the others.
    """

    kept: list[Round]
    dropped: list[Round]

    def seconds(self, name: str) -> list[float]:
        """Of one step, in each round."""
        return [round_.seconds[name] for round_ in self.kept]

    def ratios(self, slow: str, fast: str) -> list[float]:
        """How many times as fast `fast` is, in each round."""
        return [round_.seconds[slow] / round_.seconds[fast] for round_ in self.kept]

    def remark(self) -> str:
        """What was dropped and what should have been, in one line; empty where nothing was."""
        said = []
        if self.dropped:
            said.append(f"{len(self.dropped)} of {len(self.kept) + len(self.dropped)} rounds dropped")
        if late := sum(round_.disturbed for round_ in self.kept):
            said.append(f"{late} of the {len(self.kept)} kept are disturbed too: measure again on a quiet machine")
        shares = [round_.others for round_ in (*self.kept, *self.dropped) if round_.others is not None]
        if said:
            said.append(f"others took up to {max(shares):.0%} of the CPU time")
        return "; ".join(said)


def alternate(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    turn_seconds: float = TURN_SECONDS,
    cpu_seconds_of_others: Callable[[], float | None] | None = None,
) -> Measured:
    """Time each step in turn, round after round, after a warm-up; a round that others disturb is measured again.

    Args:
        turn_seconds: each turn repeats its step until so many have passed, and runs it once at least.
        cpu_seconds_of_others: what other processes have used so far; None: read from the system (`others_cpu_seconds`).
    """
    # A GPU of one's own is not slowed down by other processes on the CPU.
    others = cpu_seconds_of_others or (others_cpu_seconds if device.type == "cpu" else lambda: None)
    for step in steps.values():
        _turn(step, device, 0)
    kept: list[Round] = []
    dropped: list[Round] = []
    while len(kept) < rounds and len(kept) + len(dropped) < ATTEMPTS * rounds:
        before, started = others(), time.perf_counter()
        seconds = {name: _turn(step, device, turn_seconds) for name, step in steps.items()}
        elapsed, after = time.perf_counter() - started, others()
        available = elapsed * (os.cpu_count() or 1)
        share = None if before is None or after is None else max(0.0, after - before) / available
        round_ = Round(seconds, share)
        (dropped if round_.disturbed else kept).append(round_)
    dropped.sort(key=lambda round_: round_.others or 0.0)
    missing = rounds - len(kept)
    return Measured(kept + dropped[:missing], dropped[missing:])


def _turn(step: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Mean seconds of a step that is repeated for a while."""
    wait_for(device)
    count, started, elapsed = 0, time.perf_counter(), 0.0
    while count == 0 or elapsed < at_least:
        step()
        wait_for(device)
        count, elapsed = count + 1, time.perf_counter() - started
    return elapsed / count


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def others_cpu_seconds() -> float | None:
    """CPU time that everything but this process has used since the machine started; None where there is no /proc/stat."""
    try:
        total = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(ticks) for ticks in total[1:9])
    busy = user + nice + system + irq + softirq + steal  # guests are counted in user
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def strangers_cpu_seconds() -> float | None:
    """CPU time of all that neither we nor the processes that we started have used."""
    others, times = others_cpu_seconds(), os.times()
    return None if others is None else others - times.children_user - times.children_system


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The power of x that y grows with: the slope of log y against log x, by least squares."""
    log_x, log_y = ([math.log(value) for value in values] for values in (xs, ys))
    return statistics.linear_regression(log_x, log_y).slope


def spread(values: Iterable[float]) -> dict[str, float]:
    """The median with the lowest and the highest."""
    values = sorted(values)
    return {"median": statistics.median(values), "low": values[0], "high": values[-1]}


def rate(who: str, what: str, tokens: int, seconds: Iterable[float]) -> dict[str, Any]:
    """One row of a result: tokens a second, from the seconds of a step in each round."""
    step = spread(seconds)
    return {
        "who": who,
        "what": what,
        "tokens_per_second": tokens / step["median"],
        "low": tokens / step["high"],
        "high": tokens / step["low"],
        "seconds": step["median"],
    }


def shown(row: Mapping[str, Any]) -> str:
    """A row's tokens a second, for people."""
    return f"{row['tokens_per_second']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"


def choose_device(name: str) -> torch.device:
    """auto: the GPU where there is one.

    Raises:
        ConfigError: it is not on this machine, or no benchmark runs there.
    """
    there = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not there):
        cause = "torch finds no GPU on this machine" if name == "cuda" else "benchmarks run on cpu or cuda"
        raise ConfigError("no such device", where=f"--device={name}", cause=cause, fix="--device=auto")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_dtype(name: str, device: torch.device) -> tuple[str, torch.dtype]:
    """auto: bf16 on a GPU, fp32 on a CPU.

    Raises:
        ConfigError: no such precision.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        cause = f"there are {', '.join(DTYPES)} and auto"
        raise ConfigError("no such precision", where=f"--precision={name}", cause=cause, fix="--precision=auto")
    return name, DTYPES[name]


def at_least(least: int, **counts: int) -> None:
    """Refuse counts that are too small, by the names of their flags.

    Raises:
        ConfigError: one is.
    """
    for name, count in counts.items():
        if count < least:
            flag = f"--{name.replace('_', '-')}"
            cause = f"it must be {least} or more"
            raise ConfigError("nothing to measure", where=f"{flag}={count}", cause=cause, fix=f"{flag}={least}")


def describe(device: torch.device, precision: str) -> str:
    """The machine, for the first line of a result: also what its cores can do, which decides what is fast."""
    if device.type == "cuda":
        return f"{describe_machine(device)}, {precision}"
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    kind = torch.backends.cpu.get_cpu_capability() + (" with AMX" if has.get("amx_bf16") else "")
    return f"{describe_machine(device)}, {kind}, {torch.get_num_threads()} threads, {precision}"


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What a result must say of where and how it was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        driver = Path("/proc/driver/nvidia/version")
        if driver.is_file():
            versions["driver"] = driver.read_text(encoding="utf-8").split("\n", 1)[0]
    command = " ".join(["gpt2lab", *sys.argv[1:]])
    return {"machine": describe(device, precision), "versions": versions, "command": command}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """A result as JSON, written whole."""
    write_whole(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
