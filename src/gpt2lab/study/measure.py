"""What is measured of each trained row: side by side, in one process, on the same text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpt2lab.data.prepared import Prepared
from gpt2lab.distributed import alone
from gpt2lab.evaluate.perplexity import held_out_passages, unigram_perplexity
from gpt2lab.evaluate.scoring import losses_by_position
from gpt2lab.generation import generate
from gpt2lab.run import Run, set_up
from gpt2lab.study.grid import Row
from gpt2lab.tracking import Console, read_rows
from gpt2lab.train import train_step

ROUNDS = 7
POSITION_WINDOWS = 96
EXTRAPOLATE = 4
SAMPLES, SAMPLE_TOKENS, TEMPERATURE = 2, 120, 0.7


@dataclass(frozen=True)
class Measured:
    """One row of the table, and what its plots show.

    Attributes:
        kv_bytes_per_token: bytes of the cache after a context of the trained length, in 16 bits, divided by its tokens.
        peak_memory_bytes: of the process that trained it, libraries included.
        tokens_per_second: training; the median of alternating rounds, with the slowest and the fastest.
        loss: on the held-out text, nats a token.
        curve: validations as (tokens, seconds of training, loss).
        position_losses: mean loss at each position of a context up to `EXTRAPOLATE` times the trained length, or as far
            as the model has positions.
    """

    name: str
    changes: dict[str, Any]
    parameters: int
    kv_bytes_per_token: int
    peak_memory_bytes: int
    tokens_per_second: float
    slowest: float
    fastest: float
    loss: float
    perplexity: float
    curve: list[tuple[int, float, float]]
    position_losses: list[float]
    samples: list[str]


def measure(rows: list[Row], prompt: str, console: Console) -> tuple[list[Measured], float]:
    """Measure trained rows; also the perplexity of a unigram model on the same held-out text."""
    quiet = Console(quiet=True)
    runs = [set_up(row.config, quiet, alone(row.config)) for row in rows]
    text = held_out_passages(runs[0].data.validation, runs[0].tokenizer, runs[0].config.data.validation_tokens)
    data = runs[0].data
    assert isinstance(data, Prepared)  # the rows of a study do not stream
    unigram = unigram_perplexity(data.train, text, runs[0].tokenizer.vocab_size)
    measured = []
    console.say("measuring: loss by position, samples, cache")
    described = [_describe(run, prompt) for run in runs]
    console.say(f"measuring: training speed, {ROUNDS} rounds, the rows in turn")
    speeds = alternate([_one_step(run) for run in runs], ROUNDS)  # last: it goes on training, in memory only
    for row, run, (positions, samples, kv_bytes), rates in zip(rows, runs, described, speeds, strict=True):
        logged = list(read_rows(row.folder / "metrics.jsonl"))
        final = logged[-1]
        measured.append(
            Measured(
                name=row.name,
                changes=row.changes,
                parameters=run.model.num_parameters(),
                kv_bytes_per_token=kv_bytes,
                peak_memory_bytes=max(line.get("peak_memory_bytes", 0) for line in logged),
                tokens_per_second=statistics.median(rates),
                slowest=min(rates),
                fastest=max(rates),
                loss=final["val_loss"],
                perplexity=final["val_perplexity"],
                curve=[(r["tokens"], r.get("elapsed_seconds", 0.0), r["val_loss"]) for r in logged if "val_loss" in r],
                position_losses=positions,
                samples=samples,
            )
        )
    return measured, unigram


def alternate(steps: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Call each in turn, round after round, so that a machine whose speed drifts treats them alike; one warm-up before."""
    for step in steps:
        step()
    results: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, rates in zip(steps, results, strict=True):
            rates.append(step())
    return results


def _one_step(run: Run) -> Callable[[], float]:
    def step() -> float:
        run.model.train()
        return train_step(run)["tokens_per_second"]

    return step


def _describe(run: Run, prompt: str) -> tuple[list[float], list[str], int]:
    model, seq_len = run.model, run.config.seq_len
    text = run.data.validation
    tokens = text.read(0, len(text))
    longest = min(EXTRAPOLATE * seq_len, len(tokens) - 1)
    reach = min(seq_len, longest) if model.position_embedding is not None else longest
    # All rows are measured on the same contexts; a model without positions for the rest of them stops early.
    count = min(POSITION_WINDOWS, (len(tokens) - 1) // longest)
    starts = np.linspace(0, len(tokens) - 1 - longest, count).astype(int).tolist()
    positions = losses_by_position(model, tokens, reach, starts, borders=run.borders)
    written = generate(
        model, run.tokenizer, prompt, num_samples=SAMPLES, max_new_tokens=SAMPLE_TOKENS, temperature=TEMPERATURE
    )
    cache = model.new_cache(1, seq_len, torch.bfloat16)
    return positions.tolist(), [sample.text for sample in written], cache.nbytes // seq_len
