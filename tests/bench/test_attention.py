"""The sweep over lengths: what it times is what it says, and its numbers are what the rounds gave."""

import json
import mmap
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor

from gpt2lab.bench import timing
from gpt2lab.bench.attention import (
    AttentionBench,
    _measure_memory,
    bench_attention,
    draw_inputs,
    growth,
    make_step,
    table,
)
from gpt2lab.bench.timing import ATTEMPTS, QUIET, alternate, choose_device, others_cpu_seconds, slope
from gpt2lab.errors import ConfigError, ProcessError
from gpt2lab.tracking import Console
from tests.reference import assert_differ, assert_same

CPU = torch.device("cpu")
SMALL = AttentionBench(
    lengths=(4096, 1024), window=32, num_heads=2, num_kv_heads=1, head_dim=32, rounds=3, device="cpu", turn_seconds=0
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "bench"


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    """One real run, small."""
    return bench_attention(replace(SMALL, out=str(out)), Console(quiet=True))


# --- What is timed ----------------------------------------------------------------------------------------------------


def reference_step(settings: AttentionBench, window: int | None) -> list[Tensor]:
    """Output and gradients by the definition, in float64: the whole square of scores, masked."""
    leaves, direction = draw_inputs(settings, 140, CPU, torch.float32)
    q, k, v = leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert k.shape[1] == v.shape[1] == 1  # broadcast to all heads
    distance = torch.tensor([[i - j for j in range(140)] for i in range(140)])
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    scores = q @ k.mT / settings.head_dim**0.5
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return [out, *torch.autograd.grad(out, leaves, direction.double())]


def test_a_step_is_full_or_windowed_attention_and_its_gradients(in_blocks: list[int]) -> None:
    settings = replace(SMALL, head_dim=2)
    full, windowed = (make_step(settings, window, 140, CPU, torch.float32) for window in (None, 3))
    names = ["out", "dq", "dk", "dv"]
    for step, window, blocks in ((full, None, []), (windowed, 3, [3])):
        in_blocks.clear()
        ours = step()
        assert in_blocks == blocks
        for name, our, their in zip(names, ours, reference_step(settings, window), strict=True):
            assert_same(our, their, within=2e-5, what=f"{name}, window {window}")
    for name, a, b in zip(names, full(), windowed(), strict=True):
        assert_differ(a, b, by=0.1, what=f"{name}: full and windowed")


def test_a_window_as_long_as_the_sequence_is_full_attention() -> None:
    full = make_step(SMALL, None, 300, CPU, torch.float32)()
    for name, a, b in zip(
        ["out", "dq", "dk", "dv"], full, make_step(SMALL, 300, 300, CPU, torch.float32)(), strict=True
    ):
        assert_same(a, b, within=1e-6, what=name)
    assert_differ(full[0], make_step(SMALL, 299, 300, CPU, torch.float32)()[0], by=1e-4, what="one token less")


def test_inputs_are_random_and_in_the_precision_asked_for() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = make_step(SMALL, 8, 64, CPU, dtype)()
        assert {tensor.dtype for tensor in tensors} == {dtype}
        assert all(len(tensor.unique()) > 100 for tensor in tensors)


# --- Rounds -----------------------------------------------------------------------------------------------------------


class Machine:
    """A clock, two things that each take a second, and others who take these shares of the CPU time, round by round."""

    def __init__(self, shares: list[float]) -> None:
        self.shares, self.order = [0.0, *shares], ""  # nobody looks during the warm-up
        self.now = self.used = 0.0

    def perf_counter(self) -> float:
        return self.now

    def step(self, name: str) -> None:
        self.used += self.shares[len(self.order) // 2] * (os.cpu_count() or 1)
        self.now += 1.0
        self.order += name


def run_rounds(shares: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch) -> tuple[timing.Measured, str]:
    """The rounds, and the order of the turns."""
    machine = Machine(shares)
    monkeypatch.setattr(timing, "time", machine)
    steps = {name: partial(machine.step, name) for name in "ab"}
    measured = alternate(steps, rounds, CPU, turn_seconds=0, cpu_seconds_of_others=lambda: machine.used)
    return measured, machine.order


def test_turns_alternate_and_a_disturbed_round_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, order = run_rounds([0.01, 0.5, 0.02, 0.03], 3, monkeypatch)
    assert order == "ab" * 5  # a warm-up, three rounds, and one more
    assert [round_.others for round_ in measured.kept] == pytest.approx([0.01, 0.02, 0.03])
    assert [round_.others for round_ in measured.dropped] == pytest.approx([0.5])
    assert measured.remark() == "1 of 4 rounds dropped; others took up to 50% of the CPU time"
    assert measured.seconds("a") == [1.0] * 3


def test_a_machine_that_is_never_quiet_gives_its_quietest_rounds_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.9, 0.2, 0.8, 0.3, 0.7, 0.6]
    assert len(shares) == ATTEMPTS * 2
    measured, order = run_rounds(shares, 2, monkeypatch)
    assert order == "ab" * 7
    assert [round_.others for round_ in measured.kept] == pytest.approx([0.2, 0.3])
    assert [round_.others for round_ in measured.dropped] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert "2 of the 2 kept are disturbed too" in measured.remark() and "up to 90%" in measured.remark()


def test_quiet_rounds_need_no_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _ = run_rounds([QUIET / 2] * 2, 2, monkeypatch)
    assert measured.remark() == "" and measured.dropped == []


def test_a_turn_repeats_a_short_step_and_its_seconds_are_those_of_one() -> None:
    calls: list[float] = []
    step = {"a": lambda: calls.append(time.perf_counter())}
    started = time.perf_counter()
    measured = alternate(step, 1, CPU, turn_seconds=0.02, cpu_seconds_of_others=lambda: None)
    ended = time.perf_counter()
    _, first, *_, last = calls  # after the warm-up
    assert len(calls) > 3
    assert last - first <= measured.kept[0].seconds["a"] * (len(calls) - 1) <= ended - started
    assert measured.kept[0].others is None and not measured.kept[0].disturbed


def test_what_others_took_is_all_that_was_busy_but_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    hertz = os.sysconf("SC_CLK_TCK")
    ticks = [
        10,
        20,
        30,
        4000,
        5000,
        60,
        70,
        80,
        10,
        0,
    ]  # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text(f"cpu  {' '.join(str(tick * hertz) for tick in ticks)}\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(timing, "STAT", stat)
    before = time.process_time()
    others = others_cpu_seconds()
    assert others is not None and before <= 10 + 20 + 30 + 60 + 70 + 80 - others <= time.process_time()
    monkeypatch.setattr(timing, "STAT", tmp_path / "no-such-system")
    assert others_cpu_seconds() is None


def test_another_process_is_seen_at_work() -> None:
    before = others_cpu_seconds()
    if before is None:
        return  # this system does not tell
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    after = others_cpu_seconds()
    assert after is not None and after - before > 0.3


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_the_slope_is_the_power() -> None:
    lengths = [2048, 4096, 8192, 16384]
    for power in (0.0, 1.0, 1.15, 2.0):
        assert slope(lengths, [3e-7 * length**power for length in lengths]) == pytest.approx(power, abs=1e-12)
    assert slope(lengths, [length**2 + 1e4 * length for length in lengths]) < 1.9  # the control: no power of T
    bent = [1.0, 1.0, 1.0, 8.0]  # by hand: x = 0 1 2 3, y = 0 0 0 3 in powers of two; sum (x-1.5) y / sum (x-1.5)^2
    assert slope(lengths, bent) == pytest.approx(4.5 / 5)


def test_rows_are_what_the_contract_says_and_what_the_rounds_gave(result: dict[str, Any]) -> None:
    assert {"machine", "rows", "ratios"} <= result.keys()
    assert "CPU" in result["machine"] and "threads" in result["machine"] and "fp32" in result["machine"]
    assert [(row["who"], row["seq_len"]) for row in result["rows"]] == [
        ("full", 1024), ("window 32", 1024), ("full", 4096), ("window 32", 4096)
    ]  # fmt: skip
    for row in result["rows"]:
        rounds = result["rounds"][f"T={row['seq_len']}"]
        rates = sorted(row["seq_len"] / round_["seconds"][row["who"]] for round_ in rounds["kept"])
        assert [row["low"], row["tokens_per_second"], row["high"]] == pytest.approx(rates)
        assert f"T={row['seq_len']}" in row["what"]


def test_ratios_are_of_one_round_and_slopes_of_the_medians(result: dict[str, Any]) -> None:
    for length in (1024, 4096):
        rounds = [round_["seconds"] for round_ in result["rounds"][f"T={length}"]["kept"]]
        ratios = sorted(seconds["full"] / seconds["window 32"] for seconds in rounds)
        name = f"window over full at T={length}"
        assert [result["ratios"][name], *result["ranges"][name]] == pytest.approx([ratios[1], ratios[0], ratios[2]])
    for who in ("full", "window 32"):
        short, long = (row for row in result["rows"] if row["who"] == who)
        for kind, key in (("time", "seconds"), ("memory", "peak_memory_bytes")):
            power = torch.tensor(long[key] / short[key], dtype=torch.float64).log2().item() / 2  # four times as long
            assert result["ratios"][f"slope of {kind}, {who}"] == pytest.approx(power)


def test_memory_holds_the_inputs_and_gradients_at_least(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        head = row["seq_len"] * SMALL.head_dim * 4
        least = head * (2 * 2 + 2 * 2 + 2 + 2)  # q, dq, out and its gradient have two heads; k, v, dk and dv one
        assert least <= row["peak_memory_bytes"] < 4 * least + 2**23, row


def test_growth_is_the_highest_point_not_the_last() -> None:
    def use(size: int) -> None:
        with mmap.mmap(-1, size) as memory:  # fresh from the system, and given back
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1

    assert growth(lambda: use(2**26)) == pytest.approx(2**26, rel=0.1)
    assert 0 < growth(lambda: None) < 2**22
    assert growth(lambda: use(2**24)) == pytest.approx(2**24, rel=0.1)  # what was high before does not count


def test_a_process_that_cannot_measure_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = tmp_path / "python"
    for script, words in (
        ("echo so; echo no room >&2; exit 3", "code 3: no room"),
        ("kill -9 $$", "code -9: .*killed"),
    ):
        dying.write_text(f"#!/bin/sh\n{script}\n")
        dying.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(dying))
        with pytest.raises(ProcessError, match=f"T=64.*{words}.*Fix: "):
            _measure_memory(SMALL, None, 64, CPU, torch.float32, "fp32")


# --- What is left behind ----------------------------------------------------------------------------------------------


def test_the_file_is_the_result(result: dict[str, Any], out: Path) -> None:
    stored = json.loads((out / "attention.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["versions"]["torch"] == torch.__version__ and stored["command"].startswith("gpt2lab")
    assert sorted(path.name for path in out.iterdir()) == ["attention.json", "attention.png"]


def test_the_plot_is_a_picture_with_both_curves(result: dict[str, Any], out: Path) -> None:
    path = Path(result["plot"])
    assert path == out / "attention.png"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert 20_000 < len(content) < 500_000
    height, width, _ = (picture := matplotlib.image.imread(path)).shape
    assert (width, height) == (1440, 608)
    for colour in ("#0072b2", "#d55e00"):
        rgb = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        close = (torch.tensor(picture[:, :, :3]) - rgb).abs().amax(-1) < 0.02
        for half in (close[:, : width // 2], close[:, width // 2 :]):
            assert half.any(0).sum() > 400, f"{colour} does not go through the plot"


def test_the_table_shows_each_length_and_what_was_dropped(result: dict[str, Any]) -> None:
    remark = "1 of 4 rounds dropped; others took up to 50% of the CPU time"
    shown = table(result | {"rounds": {"T=1024": {"remark": remark}, "T=4096": {"remark": ""}}})
    for row in result["rows"]:
        assert f"{row['seq_len']:,}" in shown and f"{row['tokens_per_second']:,.0f}" in shown
    assert f"T=1024: {remark}" in shown and "T=4096:" not in shown
    assert f"time {result['ratios']['slope of time, window 32']:.2f}" in shown
    assert all(len(line) <= 128 for line in shown.splitlines()[3:-2])


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": ()}, "lengths.*two lengths or more"),
        ({"lengths": (64,)}, "lengths 64.*two lengths or more"),
        ({"lengths": (64, 64, 128)}, "lengths 64 64 128"),
        ({"lengths": (0, 64)}, "lengths 0 64"),
        ({"window": 0}, "--window=0.*Fix: --window=1"),
        ({"rounds": 0}, "--rounds=0.*Fix: --rounds=1"),
        ({"num_heads": 3, "num_kv_heads": 2}, "--num-kv-heads=2.*3 query heads.*Fix: --num-kv-heads=1"),
        ({"num_kv_heads": 0}, "--num-kv-heads=0.*Fix: --num-kv-heads=1"),
        ({"device": "tpu"}, "--device=tpu.*Fix: --device=auto"),
        ({"precision": "fp16"}, "--precision=fp16.*Fix: --precision=auto"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        bench_attention(replace(SMALL, out=str(tmp_path / "bench"), **change), Console(quiet=True))
    assert not (tmp_path / "bench").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench").write_text("mine")
    with pytest.raises(ConfigError, match=r"not a folder.*--out"):
        bench_attention(replace(SMALL, out=str(tmp_path / "bench")), Console(quiet=True))
    assert (tmp_path / "bench").read_text() == "mine"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ConfigError, match=r"--device=cuda.*no GPU.*Fix: --device=auto"):
        choose_device("cuda")
