"""Commands that train, and what can be known of a run before and after."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from gpt2lab.commands.table import Table, console, print_json, settings_help
from gpt2lab.config import to_dict
from gpt2lab.recipe import load_config


def add_to(table: Table) -> None:
    """Add the commands to the table."""
    command = table.add(
        "demo",
        demo,
        "train GPT-2 four ways on text this machine already has, and report what each costs and buys",
    )
    command.add_argument("--out", default="runs/demo", help="the folder of the study (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the rows as one JSON object")

    for name, function, help_ in (
        ("train", train, "start a run, or go on where its folder left off"),
        ("plan", plan, "what a run will need: parameters, work, memory, time; starts nothing"),
    ):
        command = table.add(
            name,
            function,
            help_,
            epilog=settings_help(),
            usage=f"gpt2lab {name} [RECIPE ...] [--section.key=value ...]",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")

    command = table.add("replay", replay, "compute a logged step of a run again, to the same bits")
    command.add_argument("run", metavar="RUN", help="a run folder")
    command.add_argument("--step", type=int, required=True, help="the step")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def demo(arguments: argparse.Namespace) -> None:
    from gpt2lab.study import demo as study

    result = study.demo(Path(arguments.out), console())
    if arguments.json:
        print_json(result)


def train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.recipes, arguments.flags)
    from gpt2lab import launch
    from gpt2lab import train as training

    if launch.must_launch(config):
        launch.launch(["train", *arguments.words], config, console().say)
        return
    folder = training.train(config, console())
    if arguments.json and launch.speaks():
        from gpt2lab.tracking import read_rows

        *_, row = read_rows(folder / "metrics.jsonl")
        print_json({"run": str(folder), **row})


def replay(arguments: argparse.Namespace) -> None:
    from gpt2lab import launch
    from gpt2lab import replay as replaying
    from gpt2lab.errors import NumbersError

    folder = Path(arguments.run)
    config = replaying.settings_of(folder, arguments.step)
    if launch.must_launch(config):
        words = ["replay", arguments.run, f"--step={arguments.step}", *["--json"] * arguments.json]
        launch.launch(words, config, console().say)
        return
    result = replaying.replay(folder, arguments.step, config, console())
    if not launch.speaks():
        return
    if arguments.json:
        print_json(asdict(result) | {"same": result.same})
    else:
        for key, value in result.logged.items():
            now = result.replayed.get(key)
            print(f"{key:14} {value}" + ("" if now == value else f", now {now}"))
        starts = result.batch["sample_starts"]
        print(
            f"text           {len(starts)} samples; the first begins at token {starts[0]}: {result.batch['text']['0'][:80]!r}"
        )
    if not result.same:
        cause = f"computed again from step {result.after_step} on, it gave other numbers"
        fix = "compare torch and machine with those in run.json; if they are the same, suspect the memory of one"
        raise NumbersError("the step does not repeat", where=f"{folder}, step {result.step}", cause=cause, fix=fix)


def plan(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.recipes, arguments.flags)
    from gpt2lab.settle import forecast

    forecasted, settled = forecast(config)
    if arguments.json:
        print_json(asdict(forecasted) | {"config": to_dict(settled.config)})
        return
    for item in settled.derived:
        print(f"derived      {item.key} = {item.value}: {item.reason}")
    print("\n".join(forecasted.lines()))
