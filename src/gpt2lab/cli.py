"""How what was typed is read, and how an error ends."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from contextlib import suppress
from typing import NoReturn, TextIO

from gpt2lab import __version__
from gpt2lab.commands import benches, data, training, weights, writing
from gpt2lab.commands.table import Parser, Table
from gpt2lab.errors import ConfigError, SaidElsewhere, as_lab_error
from gpt2lab.recipe import read_model_flags

BUG, STOPPED_BY_USER = 70, 130


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
    parser = Parser(
        prog="gpt2lab", description="The laboratory for GPT-2.", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"gpt2lab {__version__}")
    parser.set_defaults(command=lambda _: parser.print_help())
    table = Table(parser)
    for module in (training, writing, weights, benches, data):
        module.add_to(table)

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
        typed = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(typed, [option for option in options if option != typed], n=1)
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
        if word in ("--json", "--debug", "--help", "-h") or word.startswith("--quantize"):
            own += [word] if word != "--quantize" else [word, next(rest, "")]
        elif not word.startswith("--"):
            recipes.append(word)
        else:
            value = None if "=" in word else next(rest, None)
            flags.append(word if value is None else f"{word}={value}")
    return own, recipes, flags
