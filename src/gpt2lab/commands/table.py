"""The table of commands, into which each noun puts its own: the flags stand beside the function that reads them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn

from gpt2lab.config import fields
from gpt2lab.errors import ConfigError

MODEL = "a run, a checkpoint, a Hugging Face folder, or a Hub name"
Command = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """argparse, with our one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("bad command", where=self.prog, cause=message, fix=f"`{self.prog} --help` shows how")


class Table:
    """Where commands are added: the first words after ``gpt2lab``, or the second ones after such a word."""

    def __init__(self, parser: argparse.ArgumentParser, metavar: str = "COMMAND", *, required: bool = False) -> None:
        self.subparsers = parser.add_subparsers(metavar=metavar, parser_class=Parser, required=required)

    def add(self, name: str, function: Command, help_: str, **extra: Any) -> Parser:
        """A command; its flags are added to what is returned."""
        command: Parser = self.subparsers.add_parser(
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

    def group(self, name: str, help_: str, metavar: str = "COMMAND") -> Table:
        """A word that needs a second one."""
        return Table(self.subparsers.add_parser(name, help=help_), metavar, required=True)


def settings_help(section: str = "") -> str:
    """The settings of recipes, or of one section without its name, with their defaults."""
    lines = ["settings (in a recipe, or as --key=value):"]
    for key, default, text in fields():
        if not key.startswith(section):
            continue
        key = key.removeprefix(section).replace("_", "-") if section else key
        shown = "" if default is None else f" [{default!r}]" if default == "\n" else f" [{default}]"
        lines.append(f"  {key}{shown}\n      {' '.join(text.split())}")
    return "\n".join(lines)


def console() -> Any:
    """Where a command tells what it does."""
    from gpt2lab.tracking import Console

    return Console(quiet=False)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, for programs."""
    print(json.dumps(value, ensure_ascii=False))
