"""What a checkpoint a minute costs: steps of GPT-2 124M in minutes with and without one, in turn.

python -m tests.campaigns.checkpoint_cost --rounds 3 --seconds 60
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from gpt2lab.distributed import alone
from gpt2lab.recipe import load_config
from gpt2lab.run import Run, set_up
from gpt2lab.tracking import Console
from gpt2lab.train import save, train_step
from tests.test_train import flags, sentences


def minute(run: Run, seconds: float, with_checkpoint: bool) -> tuple[float, float]:
    """Seconds a step over a while that begins with a checkpoint, or without one; and seconds until it was asked for."""
    run.writer.wait()
    started, steps, asked = time.perf_counter(), 0, 0.0
    while time.perf_counter() - started < seconds:
        run.step += 1
        row = train_step(run)
        steps += 1
        if steps == 1 and with_checkpoint:
            before = time.perf_counter()
            save(run, row, wait=False)
            asked = time.perf_counter() - before
    return (time.perf_counter() - started) / steps, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--preset", default="124M")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        Path("text.txt").write_text(sentences(4000))
        settings = {
            "data.source": "text.txt", "model.preset": given.preset, "model.vocab_size": 50257, "seq_len": 128,
            "batch_tokens": 256, "micro_batch": 2, "steps": 100_000, "system.precision": "fp32", "system.device": "cpu",
            "out": "run", "optim.warmup_steps": 10,
        }  # fmt: skip
        config = load_config([], flags(settings))
        run = set_up(config, Console(quiet=True), alone(config))
        minute(run, 5, True)  # the first one gets its memory from the system
        rounds = [(minute(run, given.seconds, False), minute(run, given.seconds, True)) for _ in range(given.rounds)]
        run.close()
    ratios = [with_one[0] / without[0] for without, with_one in rounds]
    print(json.dumps({
        "step_seconds": [without[0] for without, _ in rounds],
        "step_seconds_with_a_checkpoint": [with_one[0] for _, with_one in rounds],
        "main_thread_seconds": [with_one[1] for _, with_one in rounds],
        "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
