"""How fast a model writes: ours, and other programs with the same weights, in turn on one machine.

Reading the weights once a token is the least that anybody can do, so each rate stands beside the share that it is of the
rate at which this machine reads memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpt2lab.bench.others import OTHERS
from gpt2lab.bench.timing import (
    Measured,
    alternate,
    at_least,
    choose_device,
    choose_dtype,
    environment,
    rate,
    shown,
    spread,
    write_result,
)
from gpt2lab.bench.ways import ALONE, BATCH, DRAFTED, LONG, TEXTS, Way, Work, our_ways, their_ways
from gpt2lab.config import GPT2Config
from gpt2lab.errors import ConfigError
from gpt2lab.folder import check_folder
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.seeds import generator_for
from gpt2lab.system import keep_freed_memory
from gpt2lab.tracking import Console
from gpt2lab.weights import open_model

READ_BYTES = 2**30
"""Memory that is read to see how fast that goes: more than any cache holds."""


@dataclass(frozen=True)
class DecodeBench:
    """What is measured, and where.

    Attributes:
        model: a run, a checkpoint or a foreign folder; None: the shape of GPT-2 124M with random weights.
        prompt_tokens: in each prompt. new_tokens: written after it. batch_size: texts written at once, for the rate of a batch.
        long_prompt_tokens: in the prompt whose first token is waited for.
        against: other programs: transformers, ctranslate2; None: those that are installed.
        rounds: of which the median counts.
        device: auto, cpu or cuda. precision: of our whole model and of the others': auto, fp32 or bf16; auto is bf16 on cuda.
        out: the folder for decode.json.
    """

    model: str | None = None
    prompt_tokens: int = 64
    new_tokens: int = 128
    batch_size: int = 16
    long_prompt_tokens: int = 512
    against: tuple[str, ...] | None = None
    rounds: int = 5
    device: str = "auto"
    precision: str = "auto"
    out: str = "runs/bench-decode"


def bench_decode(settings: DecodeBench, console: Console) -> dict[str, Any]:
    """Measure every way that can be had; write decode.json into `out`.

    Returns:
        What is in decode.json: ``machine``, ``rows`` and ``ratios``, and all that they were made from.

    Raises:
        ConfigError: settings that cannot work, or a program that is not installed.
    """
    names = ("prompt_tokens", "new_tokens", "batch_size", "long_prompt_tokens", "rounds")
    at_least(1, **{name: getattr(settings, name) for name in names})
    against = _installed(settings.against)
    device = choose_device(settings.device)
    precision, dtype = choose_dtype(settings.precision, device)
    folder = Path(settings.out)
    check_folder(folder)
    if device.type == "cpu":
        keep_freed_memory()
    model = _model(settings)
    work = _work(settings, model)
    with tempfile.TemporaryDirectory(prefix="gpt2lab-decode-") as place:
        ways = our_ways(model, work, device, dtype)
        for name in against:
            console.say(f"{name} makes its copy of the model")
            for kind, write in OTHERS[name](model, Path(place), device, dtype).items():
                ways += their_ways(f"{name} {kind}", write, work)
        console.say(f"{settings.rounds} rounds, and one to warm up, of {len(ways)} ways in turn")
        measured = alternate({way.name: way.turn for way in ways}, settings.rounds, device, turn_seconds=0)
    speed, ratios = memory_speed(device), _ratios(work, ways, measured)
    about = environment(device, precision)
    about["versions"] |= {name: version(name) for name in against}
    result = about | {
        "settings": asdict(settings),
        "memory_bytes_per_second": speed,
        "rows": [_row(way, measured.seconds(way.name), speed) for way in ways],
        "same_greedy_tokens": _same_tokens(ways),
        "ratios": {name: ratio["median"] for name, ratio in ratios.items()},
        "ranges": {name: [ratio["low"], ratio["high"]] for name, ratio in ratios.items()},
        "rounds": asdict(measured) | {"remark": measured.remark()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder / "decode.json", result)
    return result


def _installed(asked: Sequence[str] | None) -> list[str]:
    for name in asked or ():
        if name not in OTHERS or not find_spec(name):
            known = ", ".join(OTHERS)
            cause = "it is not installed" if name in OTHERS else f"there are {known}"
            fix = f"pip install {name}" if name in OTHERS else f"--against {next(iter(OTHERS))}"
            raise ConfigError("no such program", where=f"--against {name}", cause=cause, fix=fix)
    return [name for name in (OTHERS if asked is None else asked) if find_spec(name)]


def _model(settings: DecodeBench) -> GPT2:
    if settings.model is None:
        return GPT2.from_config(GPT2Config(), generator=generator_for(0, "bench")).eval()
    return open_model(settings.model)[0]


def _work(settings: DecodeBench, model: GPT2) -> Work:
    """Random tokens, as many as were asked for.

    Raises:
        ConfigError: more than the model has positions for.
    """
    need = max(settings.prompt_tokens + settings.new_tokens, settings.long_prompt_tokens + 1)
    if model.position_embedding is not None and need > model.max_seq_len:
        cause = f"{need} tokens, and the model's positions end at {model.max_seq_len}"
        raise ConfigError("text too long", where="--new-tokens", cause=cause, fix="ask for fewer tokens")
    generator = generator_for(0, "prompts")
    prompts = torch.randint(model.vocab_size, (settings.batch_size, settings.prompt_tokens), generator=generator)
    long = torch.randint(model.vocab_size, (settings.long_prompt_tokens,), generator=generator)
    return Work(prompts.tolist(), long.tolist(), settings.new_tokens)


def memory_speed(device: torch.device) -> float:
    """Bytes a second that a sum over `READ_BYTES` reads: the best of six."""
    numbers = torch.ones(READ_BYTES // 4, device=device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds)


def _row(way: Way, seconds: list[float], speed: float) -> dict[str, Any]:
    row = rate(way.who, way.what, way.tokens, seconds) | {"first_token_seconds": spread(way.firsts)}
    if gaps := sorted(way.gaps):
        row["token_seconds"] = {"median": statistics.median(gaps), "p99": gaps[len(gaps) * 99 // 100]}
        if way.read_bytes is not None:
            row["share_of_memory_speed"] = way.read_bytes / row["token_seconds"]["median"] / speed
    return row


def _ratios(work: Work, ways: Sequence[Way], measured: Measured) -> dict[str, dict[str, float]]:
    """How many times as many tokens a second, of each pair that says something."""
    seconds = {(way.who, way.what): measured.seconds(way.name) for way in ways}
    ours = [way.who for way in ways if way.what == BATCH]
    theirs = [way.who for way in ways if way.what == ALONE and way.who not in ours]

    def ratio(slow: tuple[str, str], fast: tuple[str, str], times: int = 1) -> dict[str, float]:
        return spread(times * a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    ratios = {}
    for who in ours:
        for other in theirs:
            ratios[f"{who} over {other}"] = ratio((other, ALONE), (who, ALONE))
            ratios[f"{who} over {other}, {LONG}"] = ratio((other, LONG), (who, LONG))
        ratios[f"{who}, {len(work.prompts)} texts over one"] = ratio((who, ALONE), (who, BATCH), len(work.prompts))
        for text in TEXTS:
            ratios[f"{who}, {text}{DRAFTED} over none"] = ratio((who, text), (who, text + DRAFTED))
    return ratios


def _same_tokens(ways: Sequence[Way]) -> dict[str, int]:
    """Of the greedy tokens of one text, how many are those that our first way wrote."""
    ours, *others = (way for way in ways if way.what == ALONE)
    return {way.who: sum(a == b for a, b in zip(way.written[0], ours.written[0], strict=True)) for way in others}


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    settings, rows = result["settings"], result["rows"]
    names = [f"{row['who']}, {row['what']}" for row in rows]
    width = max(map(len, names))
    lines = [
        f"{settings['model'] or 'GPT-2 124M, random weights'}: {settings['prompt_tokens']} tokens read, "
        f"{settings['new_tokens']} written; a batch is {settings['batch_size']} texts, a long prompt "
        f"{settings['long_prompt_tokens']} tokens",
        f"{result['machine']}; memory is read at {result['memory_bytes_per_second'] / 1e9:.1f} GB/s",
        f"median of {settings['rounds']} rounds (lowest to highest), in turn",
        "",
        f"{'':<{width}}  {'tokens/s':>22}  {'first':>8}  {'a token, p99':>14}  of memory speed",
    ]
    for name, row in zip(names, rows, strict=True):
        first, token = f"{row['first_token_seconds']['median'] * 1e3:,.0f} ms", row.get("token_seconds")
        each = f"{token['median'] * 1e3:.1f}, {token['p99'] * 1e3:.1f} ms" if token else ""
        share = f"{row['share_of_memory_speed']:.0%}" if "share_of_memory_speed" in row else ""
        lines.append(f"{name:<{width}}  {shown(row):>22}  {first:>8}  {each:>14}  {share}".rstrip())
    lines.append("")
    for name, ratio in result["ratios"].items():
        low, high = result["ranges"][name]
        lines.append(f"{name}: {ratio:.2f} ({low:.2f} to {high:.2f})")
    for who, count in result["same_greedy_tokens"].items():
        lines.append(f"{who}: {count} of {settings['new_tokens']} greedy tokens are ours")
    return "\n".join([*lines, *filter(None, [result["rounds"]["remark"]])])
