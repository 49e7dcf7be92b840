"""Commands that write with a model, and that measure how well it does."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpt2lab.commands.table import MODEL, Table, print_json
from gpt2lab.errors import ConfigError

if TYPE_CHECKING:
    from gpt2lab.generation.samples import Sample
    from gpt2lab.model.gpt2 import GPT2


def add_to(table: Table) -> None:
    """Add the commands to the table."""
    command = table.add("generate", generate, "continue a text")
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument(
        "prompt", metavar="PROMPT", nargs="+", help="the text to continue; several are written at once"
    )
    command.add_argument("--num-samples", type=int, default=1, help="continuations of each (default: %(default)s)")
    command.add_argument(
        "--max-new-tokens", type=int, default=200, help="tokens in each, at most (default: %(default)s)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)"
    )
    command.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens only")
    command.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability only")
    command.add_argument(
        "--min-p", type=float, help="draw from tokens with this share of the likeliest's probability only"
    )
    command.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: tokens of prompt and text less likely (default: none)",
    )
    command.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="off a token's logit for each time it was written (default: none)",
    )
    command.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="off the logit of each token that was written (default: none)",
    )
    command.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=NUMBER",
        help="on a token's logit; -inf bans it",
    )
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text that ends a continuation")
    command.add_argument("--num-beams", type=int, help="search for the likeliest continuation, so many at a time")
    command.add_argument(
        "--length-penalty", type=float, default=1.0, help="of beams: above 0 for longer ones (default: 1)"
    )
    command.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: each token's log-probability, and the N best"
    )
    command.add_argument(
        "--past-end",
        choices=("stop", "slide"),
        default="stop",
        help="where learned positions end: stop, or go on from the last half of them (default: %(default)s)",
    )
    command.add_argument(
        "--draft",
        metavar="DRAFT",
        help="what proposes tokens, to check several at once: ngram, early:LAYERS, or a model",
    )
    command.add_argument(
        "--quantize", choices=("int8", "int4"), help="weights in eight bits, or most of them in four, on a CPU"
    )
    _add_place(command)
    command.add_argument(
        "--cache", choices=("bf16", "int8"), help="keys and values in fewer bits (default: as the weights)"
    )
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print one JSON object")

    command = table.add(
        "selftest", selftest, "hold the shortcuts of writing against the long way round, for your model"
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument(
        "--num-tokens", type=int, default=128, help="read and written, each time (default: %(default)s)"
    )
    command.add_argument("--quantize", choices=("int8", "int4"), help="of the model in so many bits")
    _add_place(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")

    command = table.add("eval", evaluate, "measure a model on text")
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("--tasks", default="perplexity", help="names with commas between (default: %(default)s)")
    command.add_argument("--data", help="a text file, a folder, or a named source (default: the run's held-out text)")
    command.add_argument("--stride", type=int, help="tokens from window to window (default: a whole context)")
    command.add_argument("--quantize", choices=("int8", "int4"), help="of the model in so many bits")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU where there is one)"
    )
    command.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(default: bf16 on a GPU, fp32 elsewhere)"
    )


def _bias(text: str) -> tuple[int, float]:
    token_id, _, number = text.partition("=")
    try:
        return int(token_id), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no token id = number, such as 50256=-inf") from None


def generate(arguments: argparse.Namespace) -> None:
    import time

    from gpt2lab.generation.draft_names import drafts_for
    from gpt2lab.generation.samples import generate_all
    from gpt2lab.weights import open_model

    model, tokenizer = open_model(arguments.model)
    reader = _placed(arguments, model)

    def open_draft(name: str) -> GPT2:
        draft, its_tokenizer = open_model(name)
        if its_tokenizer.to_json() != tokenizer.to_json():
            cause = "its tokenizer is another one than the model's"
            raise ConfigError("draft does not fit", where="--draft", cause=cause, fix="take one with the same tokens")
        return _placed(arguments, draft)

    drafts = drafts_for(arguments.draft, reader, open_draft) if arguments.draft else None
    shown: list[str] = []  # the prompt is shown with the first of the text: what is refused shows nothing

    def show(text: str) -> None:
        sys.stdout.write(text if shown else arguments.prompt[0] + text)
        sys.stdout.flush()
        shown.append(text)

    started = time.perf_counter()
    if arguments.num_beams:
        samples = _search(arguments, reader, tokenizer)
    else:
        samples = generate_all(
            reader,
            tokenizer,
            arguments.prompt,
            num_samples=arguments.num_samples,
            max_new_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
            stop=arguments.stop,
            past_end=arguments.past_end,
            log_probabilities=arguments.logprobs,
            drafts=drafts,
            cache=arguments.cache,
            on_text=None if arguments.json else show,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            frequency_penalty=arguments.frequency_penalty,
            presence_penalty=arguments.presence_penalty,
            logit_bias=tuple(arguments.logit_bias),
        )
    seconds = time.perf_counter() - started
    written = list(zip(arguments.prompt, samples, strict=True))
    if arguments.json:
        _print_samples(written, seconds)
    else:
        show("\n" if shown else f"{samples[0][0].text}\n")
        others = [(prompt, sample) for prompt, each in written for sample in each][1:]
        for prompt, sample in others:
            print(f"{'-' * 12}\n{prompt}{sample.text}")
    if drafts is not None:
        print(f"drafts: {drafts.statistics}", file=sys.stderr)


def _placed(arguments: argparse.Namespace, model: GPT2) -> GPT2:
    from gpt2lab.generation.prepare import placed

    return placed(model, arguments.device, arguments.precision, arguments.quantize)


def _search(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[list[Sample]]:
    """The likeliest continuations, in place of drawn ones."""
    from gpt2lab.generation.samples import search

    refused = {"--draft": arguments.draft, "--stop": arguments.stop, "--logprobs": arguments.logprobs}
    for flag in (flag for flag, value in refused.items() if value):
        cause = "a search compares whole continuations, and draws none"
        raise ConfigError("not with --num-beams", where=flag, cause=cause, fix=f"leave out {flag} or --num-beams")
    return [
        search(
            model,
            tokenizer,
            prompt,
            num_beams=arguments.num_beams,
            num_samples=arguments.num_samples,
            max_new_tokens=arguments.max_new_tokens,
            length_penalty=arguments.length_penalty,
        )
        for prompt in arguments.prompt
    ]


def _print_samples(written: list[tuple[str, list[Sample]]], seconds: float) -> None:
    """One prompt stands by itself in the object; several are a list."""
    rows = []
    for prompt, samples in written:
        each = [asdict(sample) for sample in samples]
        for row in each:
            if not row["log_probabilities"]:
                del row["log_probabilities"]
        rows.append({"prompt": prompt, "samples": each})
    tokens = sum(len(sample.token_ids) for _, samples in written for sample in samples)
    print_json((rows[0] if len(rows) == 1 else {"prompts": rows}) | {"tokens_per_second": tokens / seconds})


def selftest(arguments: argparse.Namespace) -> None:
    from gpt2lab.errors import NumbersError
    from gpt2lab.generation.selftest import selftest as compare
    from gpt2lab.weights import open_model

    if arguments.num_tokens < 2:
        cause = f"{arguments.num_tokens} cannot be read in parts"
        raise ConfigError("bad number", where="--num-tokens", cause=cause, fix="such as 128")
    model = _placed(arguments, open_model(arguments.model)[0])
    findings = []
    for finding in compare(model, arguments.num_tokens):
        findings.append(finding)
        if not arguments.json:
            bits = "the same bits" if finding.same_bits else f"{finding.worst:.2g} apart"
            print(f"{'ok' if finding.passed else 'WRONG':5}  {finding.name}: {bits}, {finding.compared:,} compared")
    if arguments.json:
        print_json({"model": arguments.model, "findings": [asdict(finding) for finding in findings]})
    if wrong := [finding.name for finding in findings if not finding.passed]:
        cause = f"{len(wrong)} of {len(findings)} comparisons failed: {'; '.join(wrong)}"
        fix = "report it, with the model's config and what this printed"
        raise NumbersError(
            "a shortcut does not give what the long way gives", where=arguments.model, cause=cause, fix=fix
        )


def evaluate(arguments: argparse.Namespace) -> None:
    from gpt2lab.evaluate import tasks as known
    from gpt2lab.generation.prepare import for_reading
    from gpt2lab.weights import open_model

    model, tokenizer = open_model(arguments.model)
    if arguments.quantize:
        model = for_reading(model, arguments.quantize)
    tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    results = known.evaluate(arguments.model, model, tokenizer, tasks, data=arguments.data, stride=arguments.stride)
    if arguments.json:
        print_json({"model": arguments.model, "tasks": results})
        return
    for task, result in results.items():
        print(
            f"{task}: "
            + ", ".join(f"{k} {v:,.4f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in result.items())
        )
