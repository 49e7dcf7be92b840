"""What each command does: call one function, and print what it gives, for people or as one JSON object.

Whatever needs torch is imported inside a command, so that ``gpt2lab --help`` does not wait for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from gpt2lab.config import to_dict
from gpt2lab.errors import ConfigError
from gpt2lab.recipe import load_config


def console() -> Any:
    from gpt2lab.tracking import Console

    return Console(quiet=False)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def demo(arguments: argparse.Namespace) -> None:
    from gpt2lab.study import demo as study

    result = study.demo(Path(arguments.out), console())
    if arguments.json:
        _print_json(result)


def train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.recipes, arguments.flags)
    from gpt2lab import launch
    from gpt2lab import train as training

    if launch.must_launch(config):
        launch.launch(["train", *arguments.words], config, console().say)
        return
    folder = training.train(config, console())
    if arguments.json and launch.speaks():
        from gpt2lab.tracking import read_rows

        *_, row = read_rows(folder / "metrics.jsonl")
        _print_json({"run": str(folder), **row})


def replay(arguments: argparse.Namespace) -> None:
    from gpt2lab import launch
    from gpt2lab import replay as replaying
    from gpt2lab.errors import NumbersError

    folder = Path(arguments.run)
    config = replaying.settings_of(folder, arguments.step)
    if launch.must_launch(config):
        words = ["replay", arguments.run, f"--step={arguments.step}", *["--json"] * arguments.json]
        launch.launch(words, config, console().say)
        return
    result = replaying.replay(folder, arguments.step, config, console())
    if not launch.speaks():
        return
    if arguments.json:
        _print_json(asdict(result) | {"same": result.same})
    else:
        for key, value in result.logged.items():
            now = result.replayed.get(key)
            print(f"{key:14} {value}" + ("" if now == value else f", now {now}"))
        starts = result.batch["sample_starts"]
        print(
            f"text           {len(starts)} samples; the first begins at token {starts[0]}: {result.batch['text']['0'][:80]!r}"
        )
    if not result.same:
        cause = f"computed again from step {result.after_step} on, it gave other numbers"
        fix = "compare torch and machine with those in run.json; if they are the same, suspect the memory of one"
        raise NumbersError("the step does not repeat", where=f"{folder}, step {result.step}", cause=cause, fix=fix)


def plan(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.recipes, arguments.flags)
    from gpt2lab.settle import forecast

    forecasted, settled = forecast(config)
    if arguments.json:
        _print_json(asdict(forecasted) | {"config": to_dict(settled.config)})
        return
    for item in settled.derived:
        print(f"derived      {item.key} = {item.value}: {item.reason}")
    print("\n".join(forecasted.lines()))


def generate(arguments: argparse.Namespace) -> None:
    import time

    from gpt2lab import generation
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
    samples = generation.generate(
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


def evaluate(arguments: argparse.Namespace) -> None:
    from gpt2lab.evaluate import tasks as known
    from gpt2lab.weights import open_model

    model, tokenizer = open_model(arguments.model)
    tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    results = known.evaluate(arguments.model, model, tokenizer, tasks, data=arguments.data, stride=arguments.stride)
    if arguments.json:
        _print_json({"model": arguments.model, "tasks": results})
        return
    for task, result in results.items():
        print(
            f"{task}: "
            + ", ".join(f"{k} {v:,.4f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in result.items())
        )


def import_(arguments: argparse.Namespace) -> None:
    from gpt2lab.weights import import_model

    out = Path(arguments.out)
    found = import_model(arguments.source, out, arguments.tokenizer, allow_pickle=arguments.allow_pickle)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    _show_map(found.map, arguments.json)
    if not arguments.json:
        print(f"{found.model.num_parameters():,} parameters in {out}")


def export(arguments: argparse.Namespace) -> None:
    from gpt2lab.weights import export_model

    exported = export_model(arguments.model, Path(arguments.out), arguments.to, check=not arguments.no_check)
    checked: dict[str, Any] = {"architecture": exported.architecture, "changed": exported.changed}
    if exported.max_logit_difference is not None:
        checked |= {"max_logit_difference": exported.max_logit_difference, "greedy_tokens": exported.greedy_tokens}
    _show_map(exported.map, arguments.json, **checked)
    if arguments.json:
        return
    for line in exported.changed:
        print(f"changed    {line}")
    if exported.max_logit_difference is None:
        print("checked    no")
    else:
        print(
            f"checked    transformers' {exported.architecture}: logits within {exported.max_logit_difference:.2g} over "
            f"{exported.compared_tokens} tokens, {exported.greedy_tokens} greedy tokens the same"
        )
    print(f"{exported.architecture} in {arguments.out}")


def convert(arguments: argparse.Namespace) -> None:
    from gpt2lab.weights import convert_model

    converted, difference = convert_model(arguments.model, Path(arguments.out), arguments.changes)
    facts = {"max_logit_difference": difference, "exact": converted.exact, "approximate": converted.approximate}
    _show_map(converted.map, arguments.json, **facts)
    if arguments.json:
        return
    for line in converted.exact:
        print(f"exact      {line}")
    for line in converted.approximate:
        print(f"approximate {line}")
    print(f"logits     differ by at most {difference:.3g} on random tokens")
    start = f"; train it: gpt2lab train RECIPE --init-from={arguments.out}" if converted.approximate else ""
    print(f"{converted.model.num_parameters():,} parameters in {arguments.out}{start}")


def _show_map(found: Any, as_json: bool, **more: Any) -> None:
    """What became of every tensor."""
    lists = {name: getattr(found, name) for name in ("loaded", "transposed", "cut", "missing", "left_over")}
    if as_json:
        _print_json(lists | more)
        return
    for name, members in lists.items():
        print(f"{name.replace('_', ' '):10} {len(members)}" + "".join(f"\n  {member}" for member in members))


def bench(arguments: argparse.Namespace) -> None:
    from gpt2lab.bench import attention, experts, strategies, tokenise

    known: dict[str, tuple[Any, Any, Any]] = {
        "attention": (attention.AttentionBench, attention.bench_attention, attention.table),
        "experts": (experts.ExpertsBench, experts.bench_experts, experts.table),
        "strategies": (strategies.StrategiesBench, strategies.bench_strategies, strategies.table),
        "tokenise": (tokenise.TokeniseBench, tokenise.bench_tokenise, tokenise.table),
    }
    settings, measure, table = known[arguments.what]
    given = {field.name: vars(arguments).get(field.name) for field in fields(settings)}
    result = measure(settings(**{name: value for name, value in given.items() if value is not None}), console())
    if arguments.json:
        _print_json(result)
    else:
        print(table(result))


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
        _print_json(as_dict(findings))
    else:
        print(describe(findings))


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
