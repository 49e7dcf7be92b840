"""Commands that prepare text, and make tokenizers."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from gpt2lab.commands.table import Table, console, print_json
from gpt2lab.errors import ConfigError


def add_to(table: Table) -> None:
    """Add the commands to the table."""
    data = table.group("data", "prepare text, and look at it")
    command = data.add(
        "prepare",
        data_prepare,
        "tokenise text once into shards, to train from with data.source=DIR",
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="a file, a folder, a pattern of files, an address, hf:OWNER/NAME, - for stdin, python-docs or tinyshakespeare",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    command.add_argument("--validation", metavar="SOURCE", help="text to validate on (default: a tenth of the source)")
    command.add_argument(
        "--fields", nargs="+", default=(), metavar="NAME", help="columns or keys that hold the text (default: guessed)"
    )
    command.add_argument(
        "--on-fault",
        choices=("skip", "stop"),
        default="skip",
        help="what to do with what is not text (default: %(default)s)",
    )
    command.add_argument("--workers", type=int, metavar="N", help="processes that tokenise (default: one a core)")
    command.add_argument(
        "--part", default="1/1", metavar="I/N", help="one of N parts that machines share out; they may use one folder"
    )
    command.add_argument(
        "--engine",
        choices=("here", "ray"),
        default="here",
        help="who tokenises: this machine, or a Ray cluster (default: %(default)s)",
    )
    command.add_argument(
        "--tokenizer", default="bytes", help="bytes, chars, bpe:N, gpt2 or a folder (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command = data.add(
        "inspect",
        data_inspect,
        "the doctor: what is in a folder of shards, and what is wrong with it",
    )
    command.add_argument("path", metavar="DIR")
    command.add_argument("--tokenizer", help="of token files that others made: gpt2 or a folder")
    command.add_argument(
        "--seq-len", type=int, default=128, metavar="N", help="tokens in a sample (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")

    tokenizer = table.group("tokenizer", "make a tokenizer")
    command = tokenizer.add("train", tokenizer_train, "learn byte-pair encoding from text")
    command.add_argument(
        "source", metavar="SOURCE", nargs="+", help="python-docs, tinyshakespeare, text files or folders"
    )
    command.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    command.add_argument("--out", required=True, metavar="DIR", help="a folder for tokenizer.json")


def data_prepare(arguments: argparse.Namespace) -> None:
    from gpt2lab.config import DataConfig
    from gpt2lab.data.prepare import Write, parse_part, prepare_part

    if arguments.workers is not None and arguments.workers < 1:
        cause = f"{arguments.workers} processes would do nothing"
        raise ConfigError("bad number", where="--workers", cause=cause, fix="such as 2, or leave it out")
    config = DataConfig(
        source=tuple(arguments.source),
        validation=arguments.validation,
        fields=tuple(arguments.fields),
        on_fault=arguments.on_fault,
    )
    out, part = Path(arguments.out), parse_part(arguments.part)
    write: Write | None = None
    if arguments.engine == "ray":
        from gpt2lab.data import ray_engine

        write = partial(ray_engine.write_shards, config)
    prepared = prepare_part(config, arguments.tokenizer, out, part, arguments.workers, console().progress, write)
    if prepared is None:
        print(f"part {arguments.part} is done, in {out}.part; whoever does the last part finishes {out}")
    else:
        _show_data(prepared, arguments.json)


def data_inspect(arguments: argparse.Namespace) -> None:
    from gpt2lab.config import DataConfig
    from gpt2lab.data.doctor.advice import as_dict, describe
    from gpt2lab.data.doctor.inspect import inspect
    from gpt2lab.data.foreign import find_foreign, prepared_by_others
    from gpt2lab.data.prepared import open_prepared, refuse_other_tokenizer

    if arguments.seq_len < 1:
        raise ConfigError("bad number", where="--seq-len", cause="a sample has tokens", fix="such as 1024")
    if files := find_foreign(DataConfig(source=arguments.path)):
        prepared = prepared_by_others(files, arguments.tokenizer)
    else:
        prepared = open_prepared(Path(arguments.path))
        refuse_other_tokenizer(prepared, arguments.tokenizer)
    findings = inspect(prepared, seq_len=arguments.seq_len)
    if arguments.json:
        print_json(as_dict(findings))
    else:
        print(describe(findings))


def _show_data(prepared: Any, as_json: bool) -> None:
    summary = prepared.summary()
    if as_json:
        print_json(summary)
        return
    for name in ("train", "validation"):
        split = summary[name]
        print(
            f"{name:10} {split['tokens']:,} tokens, {split['documents']:,} documents, {split['bytes']:,} bytes of text"
        )
    for kind, count in summary["read_as"].items():
        print(f"read       {count:,} {'file' if count == 1 else 'files'} as {kind}")
    for reason, size in summary["skipped_by_reason"].items():
        first = next((row for row in summary["skipped"] if row["reason"] == reason), None)
        at = f"; first {', '.join(filter(None, (first['file'], first['where'])))}" if first else ""
        print(f"left out   {size:,} bytes: {reason}{at}")
    print(f"account    {summary['bytes_in']:,} bytes in = {summary['bytes_tokenised']:,} tokenised", end=" ")
    print(f"+ {summary['bytes_skipped']:,} left out")
    print(f"example    {summary['example']!r}")


def tokenizer_train(arguments: argparse.Namespace) -> None:
    from gpt2lab.data.sources import read_documents
    from gpt2lab.folder import check_folder
    from gpt2lab.tokenizer import Tokenizer

    out = Path(arguments.out)
    check_folder(out)
    documents = read_documents(arguments.source)
    tokenizer = Tokenizer.train_bpe((document.text for document in documents), arguments.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments.out)
    size, tokens = (
        sum(len(d.text.encode()) for d in documents),
        sum(map(len, tokenizer.encode_documents([d.text for d in documents]))),
    )
    print(f"{tokenizer.vocab_size:,} tokens in {arguments.out}; {size / tokens:.2f} bytes a token on this text")
