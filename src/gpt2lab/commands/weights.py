"""Commands that read and write models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gpt2lab.commands.table import MODEL, Table, print_json, settings_help
from gpt2lab.errors import ConfigError


def add_to(table: Table) -> None:
    """Add the commands to the table."""
    command = table.add("import", import_, "read other people's weights into a folder of ours")
    command.add_argument(
        "source", metavar="SOURCE", help="a Hugging Face folder or Hub name, OpenAI's folder, ckpt.pt, llm.c's .bin"
    )
    command.add_argument("out", metavar="DIR", help="a new folder")
    command.add_argument("--tokenizer", help="as in a recipe (default: the one beside the weights, or GPT-2's)")
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read the tensors of a pickle, in a process that can do nothing else",
    )
    command.add_argument("--json", action="store_true", help="print the map of the weights as one JSON object")

    command = table.add("export", export, "write a model as a folder or file that other programs run")
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("out", metavar="DIR", help="a new folder; with --to gguf, a new .gguf file")
    command.add_argument(
        "--to", choices=("hf", "gguf"), default="hf", help="transformers' class, or llama.cpp's file (default: hf)"
    )
    command.add_argument("--no-check", action="store_true", help="do not load it again to compare what it computes")
    command.add_argument("--json", action="store_true", help="print the map of the weights as one JSON object")

    command = table.add(
        "convert",
        convert,
        "change a trained model's parts: exactly where that can be, else as a start for training",
        usage="gpt2lab convert MODEL DIR [--num-kv-heads 4] [--position rope] [--KEY VALUE ...] | --quantize int8",
        epilog=settings_help("model."),
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("out", metavar="DIR", help="a new folder")
    command.add_argument("--quantize", choices=("int8", "int4"), help="weights in so many bits, for writing alone")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def import_(arguments: argparse.Namespace) -> None:
    from gpt2lab.weights import import_model

    out = Path(arguments.out)
    found = import_model(arguments.source, out, arguments.tokenizer, allow_pickle=arguments.allow_pickle)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    _show_map(found.map, arguments.json)
    if not arguments.json:
        print(f"{found.model.num_parameters():,} parameters in {out}")


def export(arguments: argparse.Namespace) -> None:
    from gpt2lab.weights import export_model

    exported = export_model(arguments.model, Path(arguments.out), arguments.to, check=not arguments.no_check)
    checked: dict[str, Any] = {"architecture": exported.architecture, "changed": exported.changed}
    if exported.max_logit_difference is not None:
        checked |= {"max_logit_difference": exported.max_logit_difference, "greedy_tokens": exported.greedy_tokens}
    _show_map(exported.map, arguments.json, **checked)
    if arguments.json:
        return
    for line in exported.changed:
        print(f"changed    {line}")
    if exported.max_logit_difference is None:
        print("checked    no")
    else:
        print(
            f"checked    transformers' {exported.architecture}: logits within {exported.max_logit_difference:.2g} over "
            f"{exported.compared_tokens} tokens, {exported.greedy_tokens} greedy tokens the same"
        )
    print(f"{exported.architecture} in {arguments.out}")


def convert(arguments: argparse.Namespace) -> None:
    from gpt2lab.weights import convert_model, quantize_model

    if arguments.quantize:
        if arguments.changes:
            cause, fix = "a quantised model is not changed any more", "change it first, in a folder of its own"
            raise ConfigError("one or the other", where="--quantize", cause=cause, fix=fix)
        difference = quantize_model(arguments.model, Path(arguments.out), arguments.quantize)
        if arguments.json:
            print_json({"quantize": arguments.quantize, "max_logit_difference": difference})
        else:
            print(f"logits     differ by at most {difference:.3g} on random tokens")
            print(f"{arguments.quantize} in {arguments.out}; what it costs: gpt2lab eval {arguments.out}")
        return
    converted, difference = convert_model(arguments.model, Path(arguments.out), arguments.changes)
    facts = {"max_logit_difference": difference, "exact": converted.exact, "approximate": converted.approximate}
    _show_map(converted.map, arguments.json, **facts)
    if arguments.json:
        return
    for line in converted.exact:
        print(f"exact      {line}")
    for line in converted.approximate:
        print(f"approximate {line}")
    print(f"logits     differ by at most {difference:.3g} on random tokens")
    start = f"; train it: gpt2lab train RECIPE --init-from={arguments.out}" if converted.approximate else ""
    print(f"{converted.model.num_parameters():,} parameters in {arguments.out}{start}")


def _show_map(found: Any, as_json: bool, **more: Any) -> None:
    """What became of every tensor."""
    lists = {name: getattr(found, name) for name in ("loaded", "transposed", "cut", "missing", "left_over")}
    if as_json:
        print_json(lists | more)
        return
    for name, members in lists.items():
        print(f"{name.replace('_', ' '):10} {len(members)}" + "".join(f"\n  {member}" for member in members))
