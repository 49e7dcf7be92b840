"""How fast does text become ids? Ours, and `datasets.map` with tiktoken and with tokenizers: same files, as many processes.

Each way reads the text from its files and leaves the ids on the disk, in a folder of its own that is new in every turn: ours as
shards to train from, theirs as Arrow files. All must give the same ids. They take turns, for machines are shared and their
speed drifts.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2lab.bench.timing import (
    Measured,
    alternate,
    at_least,
    environment,
    rate,
    spread,
    strangers_cpu_seconds,
    write_result,
)
from gpt2lab.config import DataConfig
from gpt2lab.data.prepare import prepare_part
from gpt2lab.errors import ConfigError, DataError, ProcessError
from gpt2lab.folder import check_folder
from gpt2lab.paths import local_copy
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, byte_characters, open_tokenizer
from gpt2lab.tracking import Console

OURS = "gpt2lab"
BATCH = 16
"""Documents in a batch of `datasets.map`: books are long, and a thousand of them, its default, are slower."""
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Way = Callable[[Path], Callable[[], np.ndarray]]
"""What fills a folder, and returns what reads the ids from it."""
Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class TokeniseBench:
    """What is measured.

    Attributes:
        files: UTF-8 text, as it is or gzip; none: the local folder of books.
        tokenizer: gpt2, or a folder with vocab.json and merges.txt.
        processes: that encode, in every way.
        rounds: of which the median counts.
        out: the folder for tokenise.json.
    """

    files: tuple[str, ...] = ()
    tokenizer: str = "gpt2"
    processes: int = 2
    rounds: int = 5
    out: str = "runs/bench-tokenise"


def bench_tokenise(settings: TokeniseBench, console: Console) -> dict[str, Any]:
    """Measure every way that is installed; write tokenise.json into `out`.

    Returns:
        What is in tokenise.json: ``machine``, ``rows`` and ``ratios``, and all that they were made from.

    Raises:
        ConfigError: settings that cannot work. DataError: a file that cannot be read. ProcessError: ids that differ.
    """
    at_least(1, rounds=settings.rounds)
    at_least(2, processes=settings.processes)
    files = _files(settings)
    folder = Path(settings.out)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = open_tokenizer(settings.tokenizer)
    size = sum(len(read(file).encode()) for file in files)
    ways: dict[str, Way] = {OURS: partial(with_ours, files, tokenizer, settings.processes)}
    for library, encode_all in {"tiktoken": with_tiktoken, "tokenizers": with_tokenizers}.items():
        if find_spec(library) and find_spec("datasets"):
            encode = encode_all(*vocabulary_and_merges(tokenizer))
            ways[f"datasets and {library}"] = partial(with_datasets, files, encode, settings.processes)
    console.say(f"{size / 1e6:,.1f} MB of text, {settings.rounds} rounds and one to warm up: {', '.join(ways)} in turn")

    ids: dict[str, np.ndarray] = {}
    steps = {name: partial(_turn, name, way, folder, ids) for name, way in ways.items()}
    cpu = torch.device("cpu")
    measured = alternate(steps, settings.rounds, cpu, turn_seconds=0, cpu_seconds_of_others=strangers_cpu_seconds)
    for name, theirs in ids.items():
        if not np.array_equal(theirs, ids[OURS]):
            cause = f"{len(theirs):,} ids, and ours are {len(ids[OURS]):,} others"
            raise ProcessError("ids differ", where=name, cause=cause, fix="report it, with the files")
    result = _result(settings, measured, size, len(ids[OURS]))
    write_result(folder / "tokenise.json", result)
    return result


def _files(settings: TokeniseBench) -> list[Path]:
    books = local_copy("books")
    files = [Path(name) for name in settings.files] or sorted(books.iterdir() if books else [])
    missing = next((file for file in files if not file.is_file()), None)
    if missing or not files:
        cause = f"{missing} is no file" if missing else "no files are given, and there is no local folder of books"
        raise ConfigError("nothing to tokenise", where="--files", cause=cause, fix="--files book.txt other.txt.gz")
    if len(files) < 2:
        raise ConfigError("too few files", where="--files", cause="there is one", fix="--files book.txt other.txt.gz")
    return files


def _turn(name: str, way: Way, place: Path, ids: dict[str, np.ndarray]) -> None:
    """One way, once; what it left on the disk is looked at the first time, which is the warm-up."""
    with tempfile.TemporaryDirectory(prefix=".tokenise-", dir=place) as folder:
        read = way(Path(folder))
        if name not in ids:
            ids[name] = read()


def _result(settings: TokeniseBench, measured: Measured, size: int, tokens: int) -> dict[str, Any]:
    names = list(measured.kept[0].seconds)
    rows = []
    for name in names:
        speeds = spread(size / 1e6 / seconds for seconds in measured.seconds(name))
        what = f"files of text to ids on disk, {settings.processes} processes"
        rows.append(rate(name, what, tokens, measured.seconds(name)) | {"megabytes_per_second": speeds})
    ratios = {f"{OURS} over {name}": spread(measured.ratios(name, OURS)) for name in names if name != OURS}
    about = environment(torch.device("cpu"), f"{settings.processes} processes")
    about["versions"] |= {name: version(name) for name in ("datasets", "tiktoken", "tokenizers") if find_spec(name)}
    return about | {
        "settings": asdict(settings),
        "bytes": size,
        "tokens": tokens,
        "rows": rows,
        "ratios": {name: ratio["median"] for name, ratio in ratios.items()},
        "ranges": {name: [ratio["low"], ratio["high"]] for name, ratio in ratios.items()},
        "rounds": asdict(measured) | {"remark": measured.remark()},
    }


# --- The ways ---------------------------------------------------------------------------------------------------------


def read(file: Path) -> str:
    """The text of a file, its ends of lines as they are.

    Raises:
        DataError: it is neither UTF-8 nor gzip of it.
    """
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8", newline="") as opened:
            return str(opened.read())
    except (OSError, EOFError, ValueError) as error:
        raise DataError("unreadable text", where=str(file), cause=str(error), fix="give other --files") from None


def with_ours(files: list[Path], tokenizer: Tokenizer, processes: int, folder: Path) -> Callable[[], np.ndarray]:
    """Prepare the files as for training: read twice, accounted for, hashed; what is returned reads back the ids of texts."""
    *train, last = map(str, files)  # held out whole, so that no document is cut
    config = DataConfig(source=tuple(train), validation=last)
    prepared = prepare_part(config, tokenizer, folder / "shards", workers=processes)
    assert prepared is not None

    def read_back() -> np.ndarray:
        ids = np.concatenate([shards.read(0, len(shards)) for shards in (prepared.train, prepared.validation)])
        return ids[ids != tokenizer.end_of_text]

    return read_back


def with_datasets(files: list[Path], encode: Encode, processes: int, folder: Path) -> Callable[[], np.ndarray]:
    """Map a data set of a row a document to ids, as an arrow file; what is returned reads them back."""
    import datasets

    datasets.disable_progress_bars()

    def rows() -> Iterator[dict[str, str]]:
        for path in files:
            yield {"text": read(path)}

    texts = datasets.Dataset.from_generator(rows, cache_dir=str(folder))
    mapped = texts.map(
        lambda batch: {"ids": encode(batch["text"])},
        batched=True, batch_size=BATCH, num_proc=processes, remove_columns=["text"],
    )  # fmt: skip
    return lambda: np.concatenate(mapped.with_format("numpy")["ids"][:])


def with_tiktoken(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Encode:
    """Its encoder, made of our files: it would download its own. A token's rank is its id, as GPT-2 has it."""
    import tiktoken

    byte_of = {char: byte for byte, char in byte_characters().items()}
    ranks = {bytes(byte_of[char] for char in token): i for token, i in vocabulary.items() if token != END_OF_TEXT}
    encoding = tiktoken.Encoding("local", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def with_tokenizers(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Encode:
    """Its encoder, with one thread in each of the processes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def vocabulary_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """What the other libraries are made of.

    Raises:
        ConfigError: the tokenizer is not of GPT-2's kind.
    """
    model = json.loads(tokenizer.to_json())["model"]
    if not model.get("merges"):
        cause = "its tokens are not made of merges"
        raise ConfigError("nothing to compare with", where="--tokenizer", cause=cause, fix="--tokenizer=gpt2")
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


# --- For people -------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    settings, rows = result["settings"], result["rows"]
    width = max(len(row["who"]) for row in rows)
    lines = [
        f"{result['bytes'] / 1e6:,.1f} MB of text to {result['tokens']:,} ids on disk, {settings['processes']} processes",
        result["machine"],
        f"median of {settings['rounds']} rounds (lowest to highest), in turn; all gave the same ids",
        "",
        f"{'':<{width}}  {'MB/s':^22}  times as slow as {OURS}",
    ]
    for row in rows:
        speed = row["megabytes_per_second"]
        cells = f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})"
        ratio, name = "", f"{OURS} over {row['who']}"
        if name in result["ratios"]:
            low, high = result["ranges"][name]
            ratio = f"{result['ratios'][name]:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"{row['who']:<{width}}  {cells:<22}  {ratio}".rstrip())
    if len(rows) == 1:
        lines.append("nothing to compare with: pip install datasets tiktoken")
    return "\n".join([*lines, *filter(None, [result["rounds"]["remark"]])])
