"""The command table: what can be typed, how it is read, and how an error ends. `commands` does the work."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from gpt2lab import __version__, commands
from gpt2lab.config import fields
from gpt2lab.errors import ConfigError, SaidElsewhere, as_lab_error
from gpt2lab.recipe import read_model_flags

BUG, STOPPED_BY_USER = 70, 130
_MODEL = "a run, a checkpoint, a Hugging Face folder, or a Hub name"


class _Parser(argparse.ArgumentParser):
    """argparse, with our one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("bad command", where=self.prog, cause=message, fix=f"`{self.prog} --help` shows how")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit code."""
    try:
        sys.exit(run(sys.argv[1:] if argv is None else argv))
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)


def _settle(stream: TextIO | None) -> None:
    """Write what is left, or let it go where nobody reads any more: the interpreter would fail over it at its end."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(argv: list[str]) -> int:
    """Run one command; return its exit code. Errors are one line on stderr, with a traceback only for ``--debug``."""
    # OpenMP's threads wait for each other in a loop; where others use the cores too, a long wait only keeps them from work.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    debug, argv = "--debug" in argv, [word for word in argv if word != "--debug"]
    if not debug:  # torch's own account of a lost connection is a page long
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        arguments = parse(argv)
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # whoever read our output has enough
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return STOPPED_BY_USER
    except Exception as error:
        if debug:
            raise
        ours = as_lab_error(error)
        if ours is None:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"gpt2lab: a bug of ours: {words}. Fix: give --debug too, and report what it shows.", file=sys.stderr)
            return BUG
        if not isinstance(ours, SaidElsewhere):
            print(f"gpt2lab: {ours}", file=sys.stderr)
        return ours.exit_code


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its arguments.

    Raises:
        ConfigError: no such command, flag or number.
    """
    parser = _Parser(
        prog="gpt2lab", description="The laboratory for GPT-2.", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"gpt2lab {__version__}")
    parser.set_defaults(command=lambda _: parser.print_help())
    subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def add(
        name: str, function: Callable[[argparse.Namespace], None], help_: str, into: Any = subparsers, **extra: Any
    ) -> _Parser:
        command: _Parser = into.add_parser(
            name,
            help=help_,
            description=help_,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **extra,
        )
        command.set_defaults(command=function)
        command.add_argument("--debug", action="store_true", help="show a traceback where something goes wrong")
        return command

    demo = add(
        "demo",
        commands.demo,
        "train GPT-2 four ways on text this machine already has, and report what each costs and buys",
    )
    demo.add_argument("--out", default="runs/demo", help="the folder of the study (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print the rows as one JSON object")

    for name, function, help_ in (
        ("train", commands.train, "start a run, or go on where its folder left off"),
        ("plan", commands.plan, "what a run will need: parameters, work, memory, time; starts nothing"),
    ):
        command = add(
            name,
            function,
            help_,
            epilog=_settings_help(),
            usage=f"gpt2lab {name} [RECIPE ...] [--section.key=value ...]",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")

    replayer = add("replay", commands.replay, "compute a logged step of a run again, to the same bits")
    replayer.add_argument("run", metavar="RUN", help="a run folder")
    replayer.add_argument("--step", type=int, required=True, help="the step")
    replayer.add_argument("--json", action="store_true", help="print one JSON object")

    generate = add("generate", commands.generate, "continue a text")
    generate.add_argument("model", metavar="MODEL", help=_MODEL)
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    generate.add_argument("--num-samples", type=int, default=1, help="continuations (default: %(default)s)")
    generate.add_argument(
        "--max-new-tokens", type=int, default=200, help="tokens in each, at most (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)"
    )
    generate.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens only")
    generate.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability only")
    generate.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object")

    evaluate = add("eval", commands.evaluate, "measure a model on text")
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL)
    evaluate.add_argument("--tasks", default="perplexity", help="names with commas between (default: %(default)s)")
    evaluate.add_argument("--data", help="a text file, a folder, or a named source (default: the run's held-out text)")
    evaluate.add_argument("--stride", type=int, help="tokens from window to window (default: a whole context)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    importer = add("import", commands.import_, "read other people's weights into a folder of ours")
    importer.add_argument(
        "source", metavar="SOURCE", help="a Hugging Face folder or Hub name, OpenAI's folder, ckpt.pt, llm.c's .bin"
    )
    importer.add_argument("out", metavar="DIR", help="a new folder")
    importer.add_argument("--tokenizer", help="as in a recipe (default: the one beside the weights, or GPT-2's)")
    importer.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read the tensors of a pickle, in a process that can do nothing else",
    )
    importer.add_argument("--json", action="store_true", help="print the map of the weights as one JSON object")

    exporter = add("export", commands.export, "write a model as a folder or file that other programs run")
    exporter.add_argument("model", metavar="MODEL", help=_MODEL)
    exporter.add_argument("out", metavar="DIR", help="a new folder; with --to gguf, a new .gguf file")
    exporter.add_argument(
        "--to", choices=("hf", "gguf"), default="hf", help="transformers' class, or llama.cpp's file (default: hf)"
    )
    exporter.add_argument("--no-check", action="store_true", help="do not load it again to compare what it computes")
    exporter.add_argument("--json", action="store_true", help="print the map of the weights as one JSON object")

    converter = add(
        "convert",
        commands.convert,
        "change a trained model's parts: exactly where that can be, else as a start for training",
        usage="gpt2lab convert MODEL DIR [--num-kv-heads 4] [--position rope] [--KEY VALUE ...]",
        epilog=_settings_help("model."),
    )
    converter.add_argument("model", metavar="MODEL", help=_MODEL)
    converter.add_argument("out", metavar="DIR", help="a new folder")
    converter.add_argument("--json", action="store_true", help="print one JSON object")

    benches = subparsers.add_parser("bench", help="measure speed and memory here, as ratios in one run").add_subparsers(
        metavar="WHAT", required=True
    )
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
            "tokenise",
            "text to ids on disk: ours, and datasets.map with tiktoken and with tokenizers",
            "processes",
        ),
    ):
        command = add(what, commands.bench, help_, into=benches)
        command.set_defaults(what=what)
        for size in (*sizes.split(), "rounds"):
            command.add_argument(f"--{size}", type=int)
        if what == "attention":
            command.add_argument("--lengths", type=int, nargs="+", help="tokens in a sequence, at least two of them")
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

    data = subparsers.add_parser("data", help="prepare text, and look at it").add_subparsers(
        metavar="COMMAND", required=True
    )
    prepare = add(
        "prepare",
        commands.data_prepare,
        "tokenise text once into shards, to train from with data.source=DIR",
        into=data,
    )
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="a file, a folder, a pattern of files, an address, hf:OWNER/NAME, - for stdin, python-docs or tinyshakespeare",
    )
    prepare.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    prepare.add_argument("--validation", metavar="SOURCE", help="text to validate on (default: a tenth of the source)")
    prepare.add_argument(
        "--fields", nargs="+", default=(), metavar="NAME", help="columns or keys that hold the text (default: guessed)"
    )
    prepare.add_argument(
        "--on-fault",
        choices=("skip", "stop"),
        default="skip",
        help="what to do with what is not text (default: %(default)s)",
    )
    prepare.add_argument("--workers", type=int, metavar="N", help="processes that tokenise (default: one a core)")
    prepare.add_argument(
        "--part", default="1/1", metavar="I/N", help="one of N parts that machines share out; they may use one folder"
    )
    prepare.add_argument(
        "--engine",
        choices=("here", "ray"),
        default="here",
        help="who tokenises: this machine, or a Ray cluster (default: %(default)s)",
    )
    prepare.add_argument(
        "--tokenizer", default="bytes", help="bytes, chars, bpe:N, gpt2 or a folder (default: %(default)s)"
    )
    prepare.add_argument("--json", action="store_true", help="print one JSON object")
    inspect = add(
        "inspect",
        commands.data_inspect,
        "the doctor: what is in a folder of shards, and what is wrong with it",
        into=data,
    )
    inspect.add_argument("path", metavar="DIR")
    inspect.add_argument("--tokenizer", help="of token files that others made: gpt2 or a folder")
    inspect.add_argument(
        "--seq-len", type=int, default=128, metavar="N", help="tokens in a sample (default: %(default)s)"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    tokenizer = subparsers.add_parser("tokenizer", help="make a tokenizer").add_subparsers(
        metavar="COMMAND", required=True
    )
    trainer = add("train", commands.tokenizer_train, "learn byte-pair encoding from text", into=tokenizer)
    trainer.add_argument(
        "source", metavar="SOURCE", nargs="+", help="python-docs, tinyshakespeare, text files or folders"
    )
    trainer.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    trainer.add_argument("--out", required=True, metavar="DIR", help="a folder for tokenizer.json")

    if argv and argv[0] in ("train", "plan"):
        own, recipes, flags = _settings(argv[1:])
        known = parser.parse_args([argv[0], *own])
        known.recipes, known.flags, known.words = recipes, flags, argv[1:]
        return known
    if argv and argv[0] == "convert":
        own, places, flags = _settings(argv[1:])
        known = parser.parse_args([argv[0], *own, *places])
        known.changes = read_model_flags(flags)
        return known
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for sub in _parsers(parser) for option in sub._option_string_actions]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        fix = f"perhaps you meant {near[0]}" if near else "`gpt2lab COMMAND --help` shows what there is"
        raise ConfigError("unknown argument", where=unknown[0], cause="this command does not take it", fix=fix)
    return known


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [p for a in parser._actions if isinstance(a, argparse._SubParsersAction) for p in a.choices.values()]
    return [parser, *(deeper for sub in below for deeper in _parsers(sub))]


def _settings(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands after `train`: flags of the command itself, recipes, and settings, with ``=`` or with a space."""
    own: list[str] = []
    recipes: list[str] = []
    flags: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--json", "--debug", "--help", "-h"):
            own.append(word)
        elif not word.startswith("--"):
            recipes.append(word)
        else:
            value = None if "=" in word else next(rest, None)
            flags.append(word if value is None else f"{word}={value}")
    return own, recipes, flags


def _settings_help(section: str = "") -> str:
    lines = ["settings (in a recipe, or as --key=value):"]
    for key, default, text in fields():
        if not key.startswith(section):
            continue
        key = key.removeprefix(section).replace("_", "-") if section else key
        shown = "" if default is None else f" [{default!r}]" if default == "\n" else f" [{default}]"
        lines.append(f"  {key}{shown}\n      {' '.join(text.split())}")
    return "\n".join(lines)
