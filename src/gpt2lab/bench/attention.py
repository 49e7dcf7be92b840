"""Is windowed attention linear where full attention is quadratic? A sweep over lengths measures time and memory of both.

What is timed is `attend`, forward and backward, with random queries, keys and values. Its projections are left out: they
cost the same with and without a window. On a CPU, memory is what a process of its own grows by in one step.
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gpt2lab.bench.timing import (
    TURN_SECONDS,
    Measured,
    alternate,
    at_least,
    choose_device,
    choose_dtype,
    environment,
    rate,
    shown,
    slope,
    spread,
    wait_for,
    write_result,
)
from gpt2lab.errors import ConfigError, ProcessError
from gpt2lab.folder import check_folder
from gpt2lab.model.attend import attend
from gpt2lab.system import keep_freed_memory, peak_memory_bytes
from gpt2lab.tracking import Console


@dataclass(frozen=True)
class AttentionBench:
    """What is measured, and where.

    Attributes:
        lengths: tokens in a sequence; at least two, for the slopes.
        window: tokens a token may see in windowed attention.
        num_kv_heads: key and value heads; None: as many as query heads.
        rounds: of which the median counts.
        device: auto, cpu or cuda. precision: auto (bf16 on cuda, fp32 on cpu), fp32 or bf16.
        out: the folder for attention.json and attention.png.
        turn_seconds: a step is repeated for so long in each of its turns.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    window: int = 512
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int = 64
    batch_size: int = 1
    rounds: int = 5
    device: str = "auto"
    precision: str = "auto"
    out: str = "runs/bench-attention"
    turn_seconds: float = TURN_SECONDS

    @property
    def compared(self) -> dict[str, int | None]:
        """The window of each that is compared, by its name."""
        return {"full": None, f"window {self.window}": self.window}


def bench_attention(settings: AttentionBench, console: Console) -> dict[str, Any]:
    """Measure full and windowed attention at each length; write attention.json and attention.png into `out`.

    Returns:
        What is in attention.json: ``machine``, ``rows`` and ``ratios``, and all that they were made from.

    Raises:
        ConfigError: settings that cannot work. ProcessError: memory could not be measured.
    """
    _check(settings)
    device = choose_device(settings.device)
    precision, dtype = choose_dtype(settings.precision, device)
    folder = Path(settings.out)
    check_folder(folder)
    if device.type == "cpu":
        keep_freed_memory()  # as in training

    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    ranges: dict[str, list[float]] = {}
    rounds: dict[str, dict[str, Any]] = {}
    full, windowed = settings.compared
    for time in sorted(settings.lengths):
        console.say(f"T={time:,}: {settings.rounds} rounds, full and windowed in turn; then the memory of each")
        measured = _measure_time(settings, time, device, dtype)
        for who, window in settings.compared.items():
            what, tokens = f"attention, forward and backward, T={time}", settings.batch_size * time
            memory = _measure_memory(settings, window, time, device, dtype, precision)
            about = {"seq_len": time, "window": window, "peak_memory_bytes": memory}
            rows.append(rate(who, what, tokens, measured.seconds(who)) | about)
        faster = spread(measured.ratios(full, windowed))
        name = f"window over full at T={time}"
        ratios[name], ranges[name] = faster["median"], [faster["low"], faster["high"]]
        rounds[f"T={time}"] = asdict(measured) | {"remark": measured.remark()}
    for who in settings.compared:
        own = [row for row in rows if row["who"] == who]
        lengths = [row["seq_len"] for row in own]
        ratios[f"slope of time, {who}"] = slope(lengths, [row["seconds"] for row in own])
        ratios[f"slope of memory, {who}"] = slope(lengths, [row["peak_memory_bytes"] for row in own])

    result = environment(device, precision) | {
        "settings": asdict(settings),
        "rows": rows,
        "ratios": ratios,
        "ranges": ranges,
        "rounds": rounds,
        "plot": (folder / "attention.png").as_posix(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    plot(result, folder / "attention.png")
    write_result(folder / "attention.json", result)
    return result


def _check(settings: AttentionBench) -> None:
    lengths = settings.lengths
    if len(set(lengths)) < max(2, len(lengths)) or min(lengths) < 1:
        cause = "a slope needs two lengths or more, each of a token or more and given once"
        where = f"--lengths {' '.join(map(str, lengths))}"
        raise ConfigError("no line through these lengths", where=where, cause=cause, fix="--lengths 2048 4096 8192")
    names = ("window", "num_heads", "head_dim", "batch_size", "rounds")
    kv_heads = settings.num_heads if settings.num_kv_heads is None else settings.num_kv_heads
    at_least(1, **{name: getattr(settings, name) for name in names}, num_kv_heads=kv_heads)
    if settings.num_heads % kv_heads:
        cause = f"it does not divide the {settings.num_heads} query heads"
        where, fix = f"--num-kv-heads={kv_heads}", "--num-kv-heads=1"
        raise ConfigError("heads that cannot be shared out", where=where, cause=cause, fix=fix)


# --- The step ---------------------------------------------------------------------------------------------------------


def draw_inputs(
    settings: AttentionBench, time: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Random q, k and v, and the gradient that comes in; the same for every window."""
    generator = torch.Generator(device).manual_seed(time)
    heads, kv_heads = settings.num_heads, settings.num_kv_heads or settings.num_heads

    def draw(count: int) -> Tensor:
        shape = (settings.batch_size, count, time, settings.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return [draw(count).requires_grad_() for count in (heads, kv_heads, kv_heads)], draw(heads)


def make_step(
    settings: AttentionBench, window: int | None, time: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """One step of training the heart of an attention layer: it returns the output, and the gradients of q, k and v."""
    leaves, direction = draw_inputs(settings, time, device, dtype)

    def step() -> tuple[Tensor, ...]:
        out = attend(*leaves, window=window)
        return out, *torch.autograd.grad(out, leaves, direction)

    return step


def _measure_time(settings: AttentionBench, time: int, device: torch.device, dtype: torch.dtype) -> Measured:
    steps = {who: make_step(settings, window, time, device, dtype) for who, window in settings.compared.items()}
    return alternate(steps, settings.rounds, device, turn_seconds=settings.turn_seconds)


# --- Memory -----------------------------------------------------------------------------------------------------------


def _measure_memory(
    settings: AttentionBench, window: int | None, time: int, device: torch.device, dtype: torch.dtype, precision: str
) -> int:
    """The most bytes that a step holds, its inputs and gradients included."""
    if device.type == "cuda":
        return _cuda_memory(lambda: make_step(settings, window, time, device, dtype)(), device)
    task = {"settings": asdict(settings), "window": window, "time": time, "precision": precision}
    task["threads"] = torch.get_num_threads()  # each has room of its own
    command = [sys.executable, "-m", "gpt2lab.bench.attention", json.dumps(task)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it was killed, perhaps for want of memory"])[-1]
        cause = f"the process that takes a step of {time} tokens ended with code {child.returncode}: {last}"
        raise ProcessError("memory not measured", where=f"T={time}", cause=cause, fix="give shorter --lengths")
    return int(child.stdout)


def _memory_in_this_process(task: str) -> int:
    """What this process, started for it, grows by in one step."""
    described = json.loads(task)
    settings = AttentionBench(**described["settings"])
    torch.set_num_threads(described["threads"])
    device = torch.device("cpu")
    _, dtype = choose_dtype(described["precision"], device)
    window = described["window"]
    # Loads libraries and starts threads; a window of 1 goes the way of a long sequence already here.
    make_step(settings, window and 1, 256, device, dtype)()
    return growth(lambda: make_step(settings, window, described["time"], device, dtype)())


def growth(function: Callable[[], object]) -> int:
    """Bytes of resident memory, a page at least, that a call adds at its highest point to what the process held before."""
    before = psutil.Process().memory_info().rss
    with suppress(OSError):  # Linux: the highest point is now; elsewhere it is that of the whole life, imports too
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    function()
    return max(_highest() - before, mmap.PAGESIZE)


def _highest() -> int:
    """The highest point of resident memory. On Linux, unlike getrusage's, it can be set back."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return peak_memory_bytes(torch.device("cpu"))


def _cuda_memory(function: Callable[[], object], device: torch.device) -> int:
    wait_for(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


# --- For people -------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    settings, ratios = result["settings"], result["ratios"]
    full, windowed = _curves(result)
    kv_heads = settings["num_kv_heads"] or settings["num_heads"]
    lines = [
        f"attention, forward and backward: {settings['num_heads']} query and {kv_heads} key heads of "
        f"{settings['head_dim']}, batch {settings['batch_size']}",
        result["machine"],
        f"median of {settings['rounds']} rounds (lowest to highest); full and windowed in turn",
        "",
        f"{'':>7}  {'tokens/s':^53}  {'':^19}  {'MB in a step':^16}".rstrip(),
        f"{'T':>7}  {full[0]['who']:^26} {windowed[0]['who']:^26}  {'times as fast':^19}  {'full':>7}  {'window':>7}",
    ]
    for a, b in zip(full, windowed, strict=True):
        name = f"window over full at T={a['seq_len']}"
        low, high = result["ranges"][name]
        faster = f"{ratios[name]:.2f} ({low:.2f} to {high:.2f})"
        memory = "  ".join(f"{row['peak_memory_bytes'] / 1e6:7,.0f}" for row in (a, b))
        lines.append(f"{a['seq_len']:>7,}  {shown(a):>26} {shown(b):>26}  {faster:>19}  {memory}")
    lines += ["", "a step grows with T to the power of (a line through the logarithms, by least squares)"]
    for row in (full[0], windowed[0]):
        time, memory = (ratios[f"slope of {kind}, {row['who']}"] for kind in ("time", "memory"))
        lines.append(f"  {row['who']:<14} time {time:.2f}   memory {memory:.2f}")
    lines += [f"{length}: {about['remark']}" for length, about in result["rounds"].items() if about["remark"]]
    return "\n".join([*lines, f"plot: {result['plot']}"])


def _curves(result: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows of full attention, and those of windowed, by length."""
    names = list(dict.fromkeys(row["who"] for row in result["rows"]))
    return [[row for row in result["rows"] if row["who"] == name] for name in names]


def plot(result: dict[str, Any], path: Path) -> None:
    """Time a token, and memory, against the length: a PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from gpt2lab.study.figures import COLOURS, STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        by_time, by_memory = figure.subplots(1, 2)
        for rows, colour, marker in zip(_curves(result), COLOURS[1:], "os", strict=False):
            who, lengths = rows[0]["who"], [row["seq_len"] for row in rows]
            time, memory = (result["ratios"][f"slope of {kind}, {who}"] for kind in ("time", "memory"))
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6}
            by_time.plot(
                lengths, [1e6 / r["tokens_per_second"] for r in rows], label=f"{who}: a step grows as T^{time:.2f}",
                **style,
            )  # fmt: skip
            bounds = ([1e6 / row[side] for row in rows] for side in ("high", "low"))
            by_time.fill_between(lengths, *bounds, color=colour, alpha=0.2, linewidth=0)
            by_memory.plot(
                lengths, [row["peak_memory_bytes"] / 1e6 for row in rows], label=f"{who}: grows as T^{memory:.2f}",
                **style,
            )  # fmt: skip
        by_time.set(ylabel="microseconds a token", title="time, forward and backward")
        by_memory.set(ylabel="MB", title="memory of a step at its highest")
        for axes in (by_time, by_memory):
            axes.set(xscale="log", yscale="log", xlabel="tokens in the sequence, T")
            axes.margins(x=0.08)
            axes.set_ylim(top=2 * axes.get_ylim()[1])  # room for the legend
            axes.xaxis.set_major_locator(FixedLocator([row["seq_len"] for row in _curves(result)[0]]))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
                axis.set_minor_locator(NullLocator())
            axes.legend(frameon=False, loc="upper left")
        figure.savefig(path)


if __name__ == "__main__":  # started by _measure_memory
    print(_memory_in_this_process(sys.argv[1]))
