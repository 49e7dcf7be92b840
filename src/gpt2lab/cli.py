"""The command table. A command parses, calls one function, and prints; whatever needs torch is imported inside it."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from gpt2lab import __version__
from gpt2lab.config import fields, to_dict
from gpt2lab.errors import ConfigError, as_lab_error
from gpt2lab.recipe import load_config

BUG, STOPPED_BY_USER = 70, 130


class _Parser(argparse.ArgumentParser):
    """argparse, with our one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("bad command", where=self.prog, cause=message, fix=f"`{self.prog} --help` shows how")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command; return its exit code. Errors are one line on stderr, with a traceback only for ``--debug``."""
    # OpenMP's threads wait for each other in a loop; where others use the cores too, a long wait only keeps them from work.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    debug, argv = "--debug" in argv, [word for word in argv if word != "--debug"]
    try:
        arguments = parse(argv)
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at the end fail
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
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def add(
        name: str, function: Callable[[argparse.Namespace], None], help_: str, into: Any = commands, **extra: Any
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
        "demo", _demo, "train GPT-2 four ways on text this machine already has, and report what each costs and buys"
    )
    demo.add_argument("--out", default="runs/demo", help="the folder of the study (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print the rows as one JSON object")

    for name, function, help_ in (
        ("train", _train, "start a run, or go on where its folder left off"),
        ("plan", _plan, "what a run will need: parameters, work, memory, time; starts nothing"),
    ):
        command = add(
            name,
            function,
            help_,
            epilog=_settings_help(),
            usage=f"gpt2lab {name} [RECIPE ...] [--section.key=value ...]",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")

    generate = add("generate", _generate, "continue a text")
    generate.add_argument("model", metavar="MODEL", help="a run, a checkpoint, a Hugging Face folder, or a Hub name")
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

    evaluate = add("eval", _eval, "measure a model on text")
    evaluate.add_argument("model", metavar="MODEL", help="a run, a checkpoint, a Hugging Face folder, or a Hub name")
    evaluate.add_argument("--tasks", default="perplexity", help="names with commas between (default: %(default)s)")
    evaluate.add_argument("--data", help="a text file, a folder, or a named source (default: the run's held-out text)")
    evaluate.add_argument("--stride", type=int, help="tokens from window to window (default: a whole context)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    importer = add("import", _import, "read other people's weights into a folder of ours")
    importer.add_argument("source", metavar="SOURCE", help="a Hugging Face GPT-2 folder, or a Hub name such as gpt2")
    importer.add_argument("out", metavar="DIR", help="a new folder")
    importer.add_argument("--json", action="store_true", help="print the map of the weights as one JSON object")

    data = commands.add_parser("data", help="prepare text, and look at it").add_subparsers(
        metavar="COMMAND", required=True
    )
    prepare = add(
        "prepare", _data_prepare, "tokenise text once into shards, to train from with data.source=DIR", into=data
    )
    prepare.add_argument("source", metavar="SOURCE", help="python-docs, tinyshakespeare, a text file or a folder")
    prepare.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    prepare.add_argument(
        "--tokenizer", default="bytes", help="bytes, chars, bpe:N, gpt2 or a folder (default: %(default)s)"
    )
    prepare.add_argument("--json", action="store_true", help="print one JSON object")
    inspect = add("inspect", _data_inspect, "what is in a folder of shards", into=data)
    inspect.add_argument("path", metavar="DIR")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    tokenizer = commands.add_parser("tokenizer", help="make a tokenizer").add_subparsers(
        metavar="COMMAND", required=True
    )
    trainer = add("train", _tokenizer_train, "learn byte-pair encoding from text", into=tokenizer)
    trainer.add_argument(
        "source", metavar="SOURCE", nargs="+", help="python-docs, tinyshakespeare, text files or folders"
    )
    trainer.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    trainer.add_argument("--out", required=True, metavar="DIR", help="a folder for tokenizer.json")

    if argv and argv[0] in ("train", "plan"):
        own, recipes, flags = _settings(argv[1:])
        known = parser.parse_args([argv[0], *own])
        known.recipes, known.flags = recipes, flags
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


def _settings_help() -> str:
    lines = ["settings (in a recipe, or as --key=value):"]
    for key, default, text in fields():
        shown = "" if default is None else f" [{default!r}]" if default == "\n" else f" [{default}]"
        lines.append(f"  {key}{shown}\n      {' '.join(text.split())}")
    return "\n".join(lines)


def _console(arguments: argparse.Namespace) -> Any:
    from gpt2lab.tracking import Console

    return Console(quiet=False)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _demo(arguments: argparse.Namespace) -> None:
    from gpt2lab.study.demo import demo

    result = demo(Path(arguments.out), _console(arguments))
    if arguments.json:
        _print_json(result)


def _train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.recipes, arguments.flags)
    from gpt2lab.train import train

    folder = train(config, _console(arguments))
    if arguments.json:
        from gpt2lab.tracking import read_rows

        *_, row = read_rows(folder / "metrics.jsonl")
        _print_json({"run": str(folder), **row})


def _plan(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.recipes, arguments.flags)
    from gpt2lab.run import forecast

    plan, settled = forecast(config)
    if arguments.json:
        _print_json(asdict(plan) | {"config": to_dict(settled.config)})
        return
    for item in settled.derived:
        print(f"derived      {item.key} = {item.value}: {item.reason}")
    print("\n".join(plan.lines()))


def _generate(arguments: argparse.Namespace) -> None:
    import time

    from gpt2lab.generation import generate
    from gpt2lab.weights import open_model

    model, tokenizer = open_model(arguments.model)
    streaming = not arguments.json

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def show_first(text: str) -> None:
        show(text if begun else arguments.prompt + text)
        begun.append(text)

    begun: list[str] = []  # the prompt is shown with the first of the text: what is refused shows nothing
    started = time.perf_counter()
    samples = generate(
        model,
        tokenizer,
        arguments.prompt,
        num_samples=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        on_text=show_first if streaming else None,
    )
    seconds = time.perf_counter() - started
    if streaming:
        show("\n" if begun else f"{arguments.prompt}\n")
        for sample in samples[1:]:
            show(f"{'-' * 12}\n{arguments.prompt}{sample.text}\n")
        return
    tokens = sum(len(sample.token_ids) for sample in samples)
    rows = [asdict(sample) for sample in samples]
    _print_json({"prompt": arguments.prompt, "samples": rows, "tokens_per_second": tokens / seconds})


def _eval(arguments: argparse.Namespace) -> None:
    from gpt2lab.evaluate.tasks import evaluate
    from gpt2lab.weights import open_model

    model, tokenizer = open_model(arguments.model)
    tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    results = evaluate(arguments.model, model, tokenizer, tasks, data=arguments.data, stride=arguments.stride)
    if arguments.json:
        _print_json({"model": arguments.model, "tasks": results})
        return
    for task, result in results.items():
        print(
            f"{task}: "
            + ", ".join(f"{k} {v:,.4f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in result.items())
        )


def _import(arguments: argparse.Namespace) -> None:
    from gpt2lab.weights import import_model

    found = import_model(arguments.source, Path(arguments.out))
    lists = {name: getattr(found, name) for name in ("loaded", "transposed", "cut", "missing", "left_over")}
    if arguments.json:
        _print_json(lists)
        return
    for name, members in lists.items():
        print(f"{name.replace('_', ' '):10} {len(members)}" + "".join(f"\n  {member}" for member in members))
    print(f"{found.model.num_parameters():,} parameters in {arguments.out}")


def _data_prepare(arguments: argparse.Namespace) -> None:
    from gpt2lab.config import DataConfig
    from gpt2lab.data.shards import prepare

    _show_data(
        prepare(DataConfig(source=arguments.source), arguments.tokenizer, folder=Path(arguments.out)), arguments.json
    )


def _data_inspect(arguments: argparse.Namespace) -> None:
    from gpt2lab.data.shards import open_prepared

    _show_data(open_prepared(Path(arguments.path)), arguments.json)


def _show_data(prepared: Any, as_json: bool) -> None:
    summary = prepared.summary()
    if as_json:
        _print_json(summary)
        return
    for name in ("train", "validation"):
        split = summary[name]
        print(
            f"{name:10} {split['tokens']:,} tokens, {split['documents']:,} documents, {split['bytes']:,} bytes of text"
        )
    print(f"example    {summary['example']!r}")


def _tokenizer_train(arguments: argparse.Namespace) -> None:
    from gpt2lab.data.sources import read_documents
    from gpt2lab.folder import check_folder
    from gpt2lab.tokenizer import Tokenizer

    out = Path(arguments.out)
    check_folder(out)
    documents = [document for source in arguments.source for document in read_documents(source)]
    tokenizer = Tokenizer.train_bpe((document.text for document in documents), arguments.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments.out)
    size, tokens = (
        sum(len(d.text.encode()) for d in documents),
        sum(map(len, tokenizer.encode_documents([d.text for d in documents]))),
    )
    print(f"{tokenizer.vocab_size:,} tokens in {arguments.out}; {size / tokens:.2f} bytes a token on this text")
