"""Commands that measure speed and memory."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from gpt2lab.commands.table import MODEL, Table, console, print_json


def add_to(table: Table) -> None:
    """Add the commands to the table."""
    benches = table.group("bench", "measure speed and memory here, as ratios in one run", "WHAT")
    for what, help_, sizes in (
        (
            "attention",
            "a window against full attention, by length",
            "window num-heads num-kv-heads head-dim batch-size",
        ),
        (
            "experts",
            "experts against the dense MLP of as many active parameters",
            "tokens embed-dim ff-hidden-dim num-experts experts-per-token",
        ),
        (
            "strategies",
            "one recipe on one process and on several, started every way: the same curve, and what each costs",
            "steps processes",
        ),
        (
            "decode",
            "writing: ours, and transformers and CTranslate2 with the same weights",
            "prompt-tokens new-tokens batch-size long-prompt-tokens",
        ),
        (
            "tokenise",
            "text to ids on disk: ours, and datasets.map with tiktoken and with tokenizers",
            "processes",
        ),
    ):
        command = benches.add(what, bench, help_)
        command.set_defaults(what=what)
        for size in (*sizes.split(), "rounds"):
            command.add_argument(f"--{size}", type=int)
        if what == "attention":
            command.add_argument("--lengths", type=int, nargs="+", help="tokens in a sequence, at least two of them")
        if what == "decode":
            command.add_argument("--model", help=f"{MODEL} (default: GPT-2 124M's shape with random weights)")
            command.add_argument(
                "--against", nargs="*", metavar="LIBRARY", help="transformers, ctranslate2 (default: those installed)"
            )
        if what == "strategies":
            command.add_argument("--recipe", metavar="FILE", help="what to train (default: a small model on a CPU)")
        elif what == "tokenise":
            command.add_argument("--files", nargs="+", metavar="FILE", help="text, also .gz (default: the local books)")
            command.add_argument("--tokenizer", help="gpt2, or a folder (default: gpt2)")
        else:
            command.add_argument("--device", choices=("auto", "cpu", "cuda"))
            command.add_argument("--precision", choices=("auto", "fp32", "bf16"))
        command.add_argument("--out", help=f"a folder for the figures (default: runs/bench-{what})")
        command.add_argument("--json", action="store_true", help="print one JSON object")


def bench(arguments: argparse.Namespace) -> None:
    from gpt2lab.bench import attention, decode, experts, strategies, tokenise

    known: dict[str, tuple[Any, Any, Any]] = {
        "attention": (attention.AttentionBench, attention.bench_attention, attention.table),
        "decode": (decode.DecodeBench, decode.bench_decode, decode.table),
        "experts": (experts.ExpertsBench, experts.bench_experts, experts.table),
        "strategies": (strategies.StrategiesBench, strategies.bench_strategies, strategies.table),
        "tokenise": (tokenise.TokeniseBench, tokenise.bench_tokenise, tokenise.table),
    }
    settings, measure, table = known[arguments.what]
    given = {field.name: vars(arguments).get(field.name) for field in fields(settings)}
    result = measure(settings(**{name: value for name, value in given.items() if value is not None}), console())
    if arguments.json:
        print_json(result)
    else:
        print(table(result))
