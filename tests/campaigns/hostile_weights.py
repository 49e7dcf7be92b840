"""Mutated weight files, thousands of them: each is a model or one line with exit code 4 or 8, and nothing else.

    python -m tests.campaigns.hostile_weights --minutes 5

Of a small model in three formats, one file at a time is changed: bytes replaced, cut, repeated, or numbers in it made huge.
The test suite runs a short one (tests/weights/test_hf.py).
"""

import argparse
import random
import re
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from gpt2lab.errors import LabError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import read_foreign
from gpt2lab.weights.export import export_hf
from tests.weights import test_llmc, test_openai
from tests.weights.models import their_model

NOT_READ = ("README.md", "checkpoint", "generation_config.json", "tokenizer_config.json")
BIG = [b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"null", b"[]", b'"x"', b"true"]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Another content, near this one. Headers stand at the start, so that is where most changes go."""
    data = bytearray(content)
    near = min(len(data), draw.choice([16, 300, 3000, len(data)]))
    match draw.randrange(6):
        case 0:
            for _ in range(draw.choice([1, 1, 2, 8])):
                data[draw.randrange(near)] = draw.randrange(256)
        case 1:
            data[draw.randrange(near)] ^= 1 << draw.randrange(8)
        case 2:
            del data[draw.randrange(len(data)) :]
        case 3:
            place, length = draw.randrange(near), draw.randrange(1, 64)
            data[place:place] = data[place : place + length] * draw.choice([1, 1, 50])
        case 4:
            place = draw.randrange(near)
            del data[place : place + draw.randrange(1, 16)]
        case _:
            numbers = list(re.finditer(rb"\d+", bytes(data[:near])))
            if numbers:
                number = draw.choice(numbers)
                data[number.start() : number.end()] = draw.choice(BIG)
    return bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, ended, seconds = random.Random(arguments.seed), Counter[str](), list[float]()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        words = Tokenizer.train_bpe(["the cat sat on the mat. " * 9], 270)
        model = GPT2(280, 32, 16, 2, 24, 2, generator=torch.Generator().manual_seed(0)).eval()
        export_hf(model, words, root / "hf", check=False)
        test_openai.write(root / "openai", test_openai.as_published(their_model()))
        (root / "llmc").mkdir()
        test_llmc.write(root / "llmc" / "model.bin", their_model())
        for name in ("openai", "llmc"):
            words.save(root / name)
        targets = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in NOT_READ]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stop = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < stop:
            target = draw.choice(targets)
            content = target.read_bytes()
            changed = mutate(content, draw)
            target.write_bytes(changed)
            began = time.perf_counter()
            try:
                read_foreign(str(target.parent / "model.bin" if target.parent.name == "llmc" else target.parent))
                outcome = "a model"
            except LabError as error:
                outcome = f"exit {error.exit_code}"
                if "\n" in str(error) or error.exit_code not in (4, 8):
                    raise
            except BaseException:
                shutil.copy(target, "hostile-case")
                print(f"{target.relative_to(root)}: kept as hostile-case")
                raise
            seconds.append(time.perf_counter() - began)
            ended[outcome] += 1
            target.write_bytes(content)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds.sort()
    print(
        f"{len(seconds)} files: {dict(ended)}; 0 crashes; 99% within {seconds[len(seconds) * 99 // 100] * 1e3:.0f} ms, "
    )
    print(f"the slowest {seconds[-1] * 1e3:.0f} ms; memory grew by {grown:.0f} MB")


if __name__ == "__main__":
    main()
