"""What it takes to prepare a large text, and to begin training from it.

    python -m tests.campaigns.large_text --megabytes 2000 --tokenizer gpt2

A text of books is made, whose words change from copy to copy; `gpt2lab data prepare` runs on it with two workers, while the
resident memory of its whole tree of processes is summed up many times a second: what processes share counts in each. Then
training is started, from these shards and from a small text that was prepared before, and timed until it has its first
step: the difference is what the size of a text costs. One JSON object is printed; with too much of either it fails.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MOST_MEMORY = 500 * 2**20
MOST_SECONDS = 2.0
RECIPE = {
    "steps": 1, "seq_len": 64, "micro_batch": 1, "batch_tokens": 64, "data.validation_tokens": 64, "sample_every": 0,
    "model.embed_dim": 16, "model.num_heads": 2, "model.num_layers": 1, "system.device": "cpu",
}  # fmt: skip


def write_text(path: Path, size: int, books: list[str], *, lines: bool) -> int:
    """Write books again and again, in each copy with other names for one word in twenty; how many bytes of file.

    Args:
        lines: as JSON lines of a paragraph each, else as one plain text.
    """
    paragraphs = [text for book in books for text in book.split("\n\n") if text.strip()]
    written, copy = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            copy += 1
            drawn = random.Random(copy)
            for paragraph in paragraphs:
                words = [
                    f"{word}{drawn.randrange(1000)}" if drawn.random() < 0.05 else word for word in paragraph.split(" ")
                ]
                text = " ".join(words) + "\n\n"
                written += file.write(json.dumps({"text": text}) + "\n" if lines else text)
                if written >= size:
                    break
    return path.stat().st_size


def watched(command: list[str]) -> tuple[int, float]:
    """Run a command: the most bytes that its processes held together, and its seconds.

    Raises:
        SystemExit: it failed.
    """
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            with suppress(psutil.NoSuchProcess):
                for one in [root, *root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        total += one.memory_info().rss
            peak = max(peak, total)
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return peak, time.perf_counter() - started


def prepare(source: Path, tokenizer: str, out: Path) -> tuple[int, float]:
    """`watched`, of a preparation with two workers."""
    words = ["data", "prepare", str(source), "--tokenizer", tokenizer, "--workers", "2", "--out", str(out)]
    return watched([sys.executable, "-m", "gpt2lab", *words])


def seconds_to_first_step(shards: Path, out: Path) -> float:
    """From the start of the command to the end of a run of one step, whose model is small."""
    shutil.rmtree(out, ignore_errors=True)
    flags = [f"--{key}={value}" for key, value in (RECIPE | {"data.source": str(shards), "out": str(out)}).items()]
    return watched([sys.executable, "-m", "gpt2lab", "train", *flags])[1]


def campaign(
    place: Path, megabytes: int, tokenizer: str, books: list[str], rounds: int, *, lines: bool
) -> dict[str, Any]:
    """All figures."""
    texts = {name: place / f"{name}{'.jsonl' if lines else '.txt'}" for name in ("large", "tiny")}
    size = write_text(texts["large"], megabytes * 10**6, books, lines=lines)
    write_text(texts["tiny"], 10**5, books, lines=lines)
    peak, seconds = prepare(texts["large"], tokenizer, place / "large")
    prepare(texts["tiny"], tokenizer, place / "tiny")
    starts: dict[str, list[float]] = {"large": [], "tiny": []}
    for _ in range(rounds):
        for name, found in starts.items():
            found.append(seconds_to_first_step(place / name, place / "run"))
    more = min(starts["large"]) - min(starts["tiny"])
    return {
        "bytes": size,
        "peak_memory_bytes": peak,
        "prepare_seconds": round(seconds, 2),
        "megabytes_per_second": round(size / seconds / 10**6, 2),
        "train_one_step_seconds": {name: [round(one, 2) for one in found] for name, found in starts.items()},
        "seconds_for_the_size": round(more, 3),
        "ok": peak < MOST_MEMORY and more < MOST_SECONDS,
    }


def main() -> None:
    """Make a text, measure, clear away."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--books", default=os.path.join(os.environ.get("GPT2LAB_DATA", "data"), "books"))
    parser.add_argument("--lines", action="store_true", help="as JSON lines")
    parser.add_argument("--rounds", type=int, default=3, help="starts of training from each text")
    arguments = parser.parse_args()
    books = [gzip.decompress(path.read_bytes()).decode() for path in sorted(Path(arguments.books).glob("*.txt.gz"))[:8]]
    if not books:
        raise SystemExit(f"no books (*.txt.gz) in {arguments.books}")
    with tempfile.TemporaryDirectory() as place:
        figures = campaign(
            Path(place), arguments.megabytes, arguments.tokenizer, books, arguments.rounds, lines=arguments.lines
        )
    print(json.dumps(figures, indent=1))
    if not figures["ok"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
