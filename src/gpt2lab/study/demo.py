"""``gpt2lab demo``: GPT-2 four ways on text that this machine already has, and one report of what each costs and buys."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from gpt2lab.settle import settle
from gpt2lab.study import figures
from gpt2lab.study.grid import Row, read_rows, train_row
from gpt2lab.study.measure import ROUNDS, measure
from gpt2lab.study.report import html_report, markdown_report, table
from gpt2lab.system import choose_device, describe_machine
from gpt2lab.tracking import Console, clock


def demo(out: Path, console: Console) -> dict[str, Any]:
    """Train, measure and report the four rows; what is already trained is not trained again.

    Returns:
        The rows of the table, and where the report is.
    """
    started = time.perf_counter()
    rows = read_rows(files("gpt2lab.study").joinpath("demo.yaml").read_text(encoding="utf-8"), out)
    names = ", ".join(row.name for row in rows)
    console.say(f"gpt2lab demo: {len(rows)} small GPT-2s ({names}); some minutes in all, and Ctrl-C loses nothing")
    rows = decide_alike(rows, console)
    for index, row in enumerate(rows, 1):
        console.say(f"\nrow {index} of {len(rows)}: {row.name}")
        train_row(row, console)
    console.say("")
    config = rows[0].config
    measured, unigram = measure(rows, config.sample_prompt, console)
    trained_len = config.seq_len or config.model.max_seq_len
    figures.learning_curves(measured, out / "learning.png")
    figures.loss_by_position(measured, trained_len, out / "positions.png")
    tokens = (config.steps or 0) * config.batch_tokens
    command = f"gpt2lab demo --out {out.as_posix()}"
    environment = f"{describe_machine(choose_device('auto'))}, {config.system.precision}; {ROUNDS} rounds of speed"
    report = markdown_report(
        measured,
        unigram=unigram,
        intro=(
            f"Four small GPT-2s, {config.model.num_layers} layers of width {config.model.embed_dim}, each trained on the "
            f"same {tokens:,} tokens of {config.data.source} from the same seed. **This is the small study**: minutes on a "
            "laptop, one seed. It shows how the parts behave, not how they would at the size of GPT-2; differences of a "
            "hundredth in the loss mean nothing."
        ),
        trained_len=trained_len,
        command=command,
        environment=environment,
        prompt=config.sample_prompt,
    )
    (out / "report.md").write_text(report, encoding="utf-8")
    (out / "report.html").write_text(html_report(report, out), encoding="utf-8")
    result = {
        "command": command,
        "environment": environment,
        "rows": [asdict(row) for row in measured],
        "unigram_perplexity": unigram,
        "report": (out / "report.md").as_posix(),
    }
    (out / "report.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    console.say(f"\n{table(measured)}\n\nunigram model: perplexity {unigram:.1f}")
    console.say(f"report: {out / 'report.html'} and report.md, after {clock(time.perf_counter() - started)}")
    return result


def decide_alike(rows: list[Row], console: Console) -> list[Row]:
    """What the machine decides (precision, micro-batch) is decided once, so that the rows differ only in their changes."""
    settled = settle(rows[0].config)
    for item in settled.derived:
        console.say(f"derived  {item.key} = {item.value}: {item.reason}")
    chosen = settled.config
    return [
        replace(
            row,
            config=replace(
                row.config,
                micro_batch=chosen.micro_batch,
                system=replace(row.config.system, precision=chosen.system.precision),
            ),
        )
        for row in rows
    ]
