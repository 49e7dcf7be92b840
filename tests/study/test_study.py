"""A study's rows, its report, and the table of the README, which is made from a committed result."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from threading import Thread

import pytest

from gpt2lab import checkpoint
from gpt2lab.errors import Interrupted, ProcessError
from gpt2lab.recipe import flat
from gpt2lab.study import figures
from gpt2lab.study.grid import read_rows, train_row
from gpt2lab.study.measure import Measured, alternate
from gpt2lab.study.report import findings, html_report, markdown_report, table
from gpt2lab.tracking import Console
from gpt2lab.tracking import read_rows as read_json_rows
from tests.conftest import ROOT

STUDY = """
recipe: {steps: 2, batch_tokens: 64, model: {preset: tiny-64, max_seq_len: 32}, data: {source: nothing-here}}
rows:
  standard: {}
  +RoPE: {model.position: rope}
  +GQA: {model.num_kv_heads: 1}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2LAB_CACHE", str(tmp_path / "cache"))


def measured(name: str, loss: float, speed: float) -> Measured:
    return Measured(
        name=name, changes={"model.position": "rope"}, parameters=1234, kv_bytes_per_token=512, peak_memory_bytes=10**9,
        tokens_per_second=speed, slowest=speed - 1, fastest=speed + 1, loss=loss, perplexity=2.0,
        curve=[(0, 0.0, 5.0), (64, 1.0, 4.0), (128, 2.0, loss)], position_losses=[4.0] * 64, samples=["a ``` b <b>"],
    )  # fmt: skip


def committed() -> list[Measured]:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    return [Measured(**row) for row in result["rows"]]


def test_each_row_keeps_what_stands_above_it(tmp_path: Path) -> None:
    standard, rope, gqa = read_rows(STUDY, tmp_path)
    changed = {key: value for key, value in flat(gqa.config).items() if flat(standard.config)[key] != value}
    assert changed == {"out": str(tmp_path / "gqa"), "model.position": "rope", "model.num_kv_heads": 1}
    assert gqa.changes == {"model.num_kv_heads": 1}
    assert rope.config.model.num_kv_heads is None


def test_the_demo_has_the_four_rows(tmp_path: Path) -> None:
    rows = read_rows(files("gpt2lab.study").joinpath("demo.yaml").read_text(), tmp_path)
    assert [row.name for row in rows] == ["standard", "+RoPE", "+GQA", "+sliding window"]
    assert len({(row.config.seed, row.config.steps, row.config.batch_tokens) for row in rows}) == 1


def test_a_row_that_fails_ends_the_study_and_names_itself(tmp_path: Path) -> None:
    row = read_rows(STUDY, tmp_path)[1]
    with pytest.raises(ProcessError, match=r"\+RoPE.*exit code 3"):
        train_row(row, Console(quiet=True))
    assert "gpt2lab train" in (tmp_path / "rope.yaml").read_text()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_has_saved_its_row_and_goes_on(kind: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    study = STUDY.replace("steps: 2", "steps: 4000").replace("nothing-here", str(tmp_path / "text.txt"))
    row = read_rows(study, tmp_path)[0]
    metrics = row.folder / "metrics.jsonl"

    def stop_soon() -> None:
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            time.sleep(0.05)
        os.kill(os.getpid(), kind)

    Thread(target=stop_soon, daemon=True).start()
    with pytest.raises(Interrupted, match=r"standard has saved its checkpoint"):
        train_row(row, Console(quiet=True))
    newest, troubles = checkpoint.latest(row.folder)
    assert newest is not None and not troubles and 0 < newest.state["step"] < 4000
    steps = [line["step"] for line in read_json_rows(metrics)]
    assert steps == list(range(newest.state["step"] + 1))


def test_rows_are_measured_in_turn() -> None:
    order: list[str] = []

    def step(name: str) -> float:
        order.append(name)
        return float(len(order))

    speeds = alternate([lambda: step("a"), lambda: step("b")], rounds=3)
    assert "".join(order) == "ab" * 4  # a warm-up, then the rounds
    assert speeds == [[3, 5, 7], [4, 6, 8]]


def test_findings_say_no_more_than_was_measured() -> None:
    first = measured("standard", 3.0, 100.0)
    same, worse, faster = measured("same", 3.005, 100.5), measured("worse", 3.2, 100.5), measured("faster", 2.5, 200.0)
    assert "no difference that one seed could show" in findings([first, same])[0]
    assert "within the noise" in findings([first, same])[0]
    assert "looks worse" in findings([first, worse])[0]
    assert "looks better" in findings([first, faster])[0] and "100% faster" in findings([first, faster])[0]


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    rows = [measured("standard", 3.0, 100.0), measured("+RoPE", 2.9, 90.0)]
    figures.learning_curves(rows, tmp_path / "learning.png")
    figures.loss_by_position(rows, 32, tmp_path / "positions.png")
    text = markdown_report(
        rows, unigram=50.0, intro="Small.", trained_len=32, command="gpt2lab demo", environment="here", prompt="def "
    )
    page = html_report(text, tmp_path)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<table>" in page and "&lt;b&gt;" in page and "<b>" not in page  # a sample is text, never markup
    assert "50.0" in page and "25.0 times less" in page


def test_the_readme_shows_the_committed_table() -> None:
    shown = re.search(
        r"<!-- table: benchmarks/results/demo.json -->\n(.*?)\n<!-- end -->", (ROOT / "README.md").read_text(), re.S
    )
    rows = committed()
    assert shown and shown[1].strip() == table(rows)
    assert shown[1].strip() != table([replace(rows[0], loss=rows[0].loss + 1), *rows[1:]])
