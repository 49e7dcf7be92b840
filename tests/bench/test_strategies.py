"""Strategies against one process: the figures are those of the runs, each way is started as a user would, faults are seen."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2lab import cli
from gpt2lab.bench import strategies
from gpt2lab.bench.strategies import LAUNCHERS, SINGLE, Bench, StrategiesBench, Way, bench_strategies, table
from gpt2lab.errors import ConfigError, ProcessError
from gpt2lab.recipe import load_config
from gpt2lab.tracking import Console, read_rows
from gpt2lab.train import train

QUIET = Console(quiet=True)
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(Path(strategies.__file__).parents[2]))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own, on a shorter text."""
    path = strategies.write_recipe(tmp_path_factory.mktemp("recipe"))
    text = path.with_name("text.txt")
    text.write_text(text.read_text()[:20_000])
    return path


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run twice, and one of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [f"--steps={STEPS}", "--validate_every=0", "--checkpoint_every=0"]
    seeds = {"first": 1, "again": 1, "other": 2}
    return {
        name: train(load_config([str(recipe)], [*flags, f"--seed={seed}", f"--out={folder / name}"]), QUIET)
        for name, seed in seeds.items()
    }


def test_the_recipe_has_what_strategies_can_get_wrong(recipe: Path) -> None:
    config = load_config([str(recipe)])
    assert config.model.dropout > 0 and config.micro_batch and config.seq_len
    passes = config.batch_tokens // (config.micro_batch * config.seq_len)
    assert [passes % processes for processes in (1, 2, 3, 4)] == [0, 0, 0, 2]
    assert config.system.precision == "fp32"


def test_each_way_is_a_command_of_its_own(recipe: Path, tmp_path: Path) -> None:
    ways = [SINGLE, *(Way("ddp", 3, launcher) for launcher in LAUNCHERS), Way("fsdp", 2, exact=True)]
    assert len({way.name for way in ways}) == len({tuple(way.command(recipe, 7, tmp_path)) for way in ways}) == 5
    for way in ways:
        command = way.command(recipe, 7, tmp_path)
        words = command[command.index("train") + 1 :]
        config = load_config([words[0]], words[1:])
        assert (config.steps, config.out) == (7, str(tmp_path))
        assert (config.system.strategy, config.system.exact) == (way.strategy, way.exact)
        launcher = command[: command.index("gpt2lab")]
        told = [word.partition("=")[2] for word in launcher if re.match("--(nproc.per.node|num_processes)=", word)]
        assert [config.system.num_processes, *told].count(None) == len(told) == (way.launcher != "gpt2lab")
        assert str(way.processes) in (*told, str(config.system.num_processes))


def test_differences_are_those_of_the_rows(runs: dict[str, Path]) -> None:
    assert strategies.differences(runs["first"], runs["again"]) == {"loss": 0, "grad_norm": 0}
    found = strategies.differences(runs["first"], runs["other"])
    for key in ("loss", "grad_norm"):
        ours, theirs = ([row[key] for row in read_rows(runs[name] / "metrics.jsonl") if row["step"]]
                        for name in ("first", "other"))  # fmt: skip
        assert found[key] == max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > strategies.GOALS[key]
    digests = {name: strategies.digest(run) for name, run in runs.items()}
    assert digests["first"] == digests["again"] != digests["other"]


def test_the_speed_is_that_of_the_steps_after_the_first(runs: dict[str, Path]) -> None:
    ends = [row["elapsed_seconds"] for row in read_rows(runs["first"] / "metrics.jsonl") if row["step"]]
    seconds = strategies.step_seconds(runs["first"])
    assert len(seconds) == STEPS - 1 and math.fsum(seconds) == pytest.approx(ends[-1] - ends[0])
    config = load_config([str(runs["first"] / "config.yaml")])
    row = strategies.row(Way("ddp", 2), runs["first"], runs["other"], config)
    assert row["low"] == pytest.approx(1536 / max(seconds)) and row["high"] == pytest.approx(1536 / min(seconds))
    assert row["who"] == "ddp 2" and row["differences"]["loss"] > 0


def test_a_run_is_started_and_must_be_what_it_was_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(recipe, 2, tmp_path, QUIET)
    run = bench.train(Way("ddp", 2, "accelerate launch"))
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1, 2]
    # a launcher that does not start what it is asked for: one process, where two were wanted
    monkeypatch.setitem(LAUNCHERS, "deaf", lambda processes: [])
    with pytest.raises(ProcessError, match=r"ddp 2 deaf.*it ran as ddp on 1"):
        bench.train(Way("ddp", 2, "deaf"))
    with pytest.raises(ProcessError, match=r"single.*No such file"):
        Bench(tmp_path / "none.yaml", 2, tmp_path / "other", QUIET).train(SINGLE)


def test_the_whole_benchmark(
    runs: dict[str, Path], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each way's run is one that is there already, and fsdp's is the one of another seed: the table must say so."""

    def there_already(bench: Bench, way: Way, again: str = "") -> Path:
        return runs["other" if way.strategy == "fsdp" else "first"]

    monkeypatch.setattr(Bench, "train", there_already)
    words = [f"--recipe={recipe}", f"--steps={STEPS}", "--rounds=2", f"--out={tmp_path / 'bench'}", "--json"]
    assert cli.run(["bench", "strategies", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "bench" / "strategies.json").read_text())
    assert list(result["curves"]) == ["single", "ddp 2", "fsdp 2", "ddp 2 torchrun", "ddp 2 accelerate launch"]
    assert [entry["who"] for entry in result["exact"]] == [
        *(f"ddp {count} exact" for count in (1, 2, 3, 4)), *(f"fsdp {count} exact" for count in (2, 3, 4))
    ]  # fmt: skip
    assert list(result["ratios"].values()) == [1.0, 1.0] and len(result["rounds"]["kept"]) == 2
    shown = table(result)
    assert "within 1e-06: NO" in shown and "2 DIFFERENT weights" in shown
    for row in result["rows"]:
        row["differences"] = {"loss": 1e-7, "grad_norm": 1e-6}
    shown = table(result | {"exact": result["exact"][:4], "curves": {"single": [1.5] * STEPS}})
    assert "within 1e-06: yes" in shown and "NO" not in shown and "the same weights to the bit" in shown


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    settings = StrategiesBench(out=str(tmp_path / "bench"))
    with pytest.raises(ConfigError, match=r"--processes=1.*Fix: --processes=2"):
        bench_strategies(replace(settings, processes=1), QUIET)
    assert not (tmp_path / "bench").exists()
    (tmp_path / "bench" / "runs").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"earlier benchmark.*--out"):
        bench_strategies(settings, QUIET)
