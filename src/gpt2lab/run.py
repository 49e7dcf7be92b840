"""A run before its first step: what is left open decided, the text prepared, the model built, where it left off restored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock

from gpt2lab import checkpoint, weights
from gpt2lab.checkpoint import Checkpoint
from gpt2lab.config import GPT2Config, ResolvedConfig, RunConfig
from gpt2lab.data.batches import Batches, check_length
from gpt2lab.data.shards import Prepared, prepare
from gpt2lab.errors import CheckpointError, ConfigError, DataError
from gpt2lab.folder import (
    check_folder,
    inherit,
    lock_folder,
    open_folder,
    read_stored,
    refuse_differences,
    refuse_other_text,
)
from gpt2lab.generation.decode import check_prompt
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.optim import make_optimizer
from gpt2lab.plan import Derived, Plan, flops_per_token, make_plan, resolve
from gpt2lab.seeds import generator_for
from gpt2lab.system import (
    available_memory_bytes,
    choose_device,
    choose_precision,
    describe_machine,
    keep_freed_memory,
    make_accelerator,
    product_rate,
)
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.tracking import Console, JsonLines


@dataclass
class Run:
    """A run that is set up: everything the loop touches.

    Attributes:
        config: with nothing left open.
        model: as it is; `training_model` has the same weights, wrapped for precision, and compiled where asked.
        step: optimizer steps done.
        elapsed_seconds: spent in steps, over all sittings.
    """

    config: ResolvedConfig
    folder: Path
    lock: FileLock
    run_id: str
    console: Console
    device: torch.device
    tokenizer: Tokenizer
    data: Prepared
    batches: Batches
    model: GPT2
    training_model: Callable[..., torch.Tensor]
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    metrics: JsonLines
    samples: JsonLines
    step: int = 0
    elapsed_seconds: float = 0.0


@dataclass(frozen=True)
class Settled:
    """Settings with nothing left open, and what had to be opened to know them.

    Attributes:
        start: the model to start from and its tokenizer, where one is named.
        derived: what was left open, and why it became what it is.
    """

    config: ResolvedConfig
    device: torch.device
    data: Prepared
    start: tuple[GPT2, Tokenizer] | None
    derived: list[Derived]


def settle(config: RunConfig, resumed: Checkpoint | None = None) -> Settled:
    """Decide everything that a recipe leaves open, on this machine; the text is prepared, and nothing is trained.

    Raises:
        LabError: settings, text or weights that cannot work.
    """
    device = choose_device(config.system.device)
    start = weights.open_model(config.init_from) if config.init_from and resumed is None else None
    if start is not None and config.model == GPT2Config():
        config = replace(config, model=start[0].config)
    data = prepare(config.data, choose_tokenizer(config, resumed, start))
    resolved, derived = resolve(
        config, data.tokenizer.vocab_size, len(data.train), device.type, available_memory_bytes(device)
    )
    check(resolved, data)
    tokens = resolved.micro_batch * resolved.seq_len
    precision, reason = choose_precision(resolved.system, resolved.model, tokens, device)
    if resolved.system.precision == "auto":
        derived.append(Derived("system.precision", precision, reason))
    resolved = replace(resolved, system=replace(resolved.system, precision=precision))
    return Settled(resolved, device, data, start, derived)


def forecast(config: RunConfig) -> tuple[Plan, Settled]:
    """What a run would need on this machine."""
    settled = settle(config)
    resolved, tokens = settled.config, settled.config.micro_batch * settled.config.seq_len
    rate = product_rate(resolved.system.precision, resolved.model, tokens, settled.device)
    return make_plan(resolved, rate), settled


def set_up(config: RunConfig, console: Console) -> Run:
    """A run that is ready for its next step, new or where its folder left off.

    Raises:
        LabError: settings, text, weights or folder that cannot work; nothing that was there is changed.
    """
    folder = Path(config.out)
    check_folder(folder)
    with ExitStack() as on_failure:
        lock = lock_folder(folder) if folder.is_dir() else None
        if lock is not None:
            on_failure.callback(lock.release)
        run = open_run(config, folder, lock, console)
        on_failure.pop_all()
    return run


def open_run(config: RunConfig, folder: Path, lock: FileLock | None, console: Console) -> Run:
    """What `set_up` does once the folder is ours, or known to be new (then it is locked when it is made)."""
    stored = read_stored(folder)
    if stored is not None:
        config = inherit(config, stored)
        refuse_differences(config, stored, folder, except_for=frozenset(["steps", "epochs"]))  # which may be open yet
    checkpoint.sweep(folder)
    resumed, troubles = checkpoint.latest(folder)
    for trouble in troubles:
        console.say(f"left aside: {trouble}")
    settled = settle(config, resumed)
    resolved, device, data = settled.config, settled.device, settled.data
    if stored is not None:
        refuse_differences(resolved, stored, folder)
        refuse_other_text(folder, data)

    model = GPT2.from_config(resolved.model, generator=generator_for(resolved.seed, "weights"))
    if settled.start is not None:
        checkpoint.assign_weights(model, settled.start[0].state_dict(), str(config.init_from))
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).train()
    accelerator = make_accelerator(resolved.system.precision, device)
    prepared_model, optimizer = accelerator.prepare(model, make_optimizer(model, resolved.optim))
    run_id = open_folder(folder, resolved, data)
    run = Run(
        config=resolved,
        folder=folder,
        lock=lock or lock_folder(folder),
        run_id=run_id,
        console=console,
        device=device,
        tokenizer=data.tokenizer,
        data=data,
        batches=Batches(
            data.train,
            seq_len=resolved.seq_len,
            step_samples=resolved.batch_tokens // resolved.seq_len,
            micro_batch=resolved.micro_batch,
            seed=resolved.seed,
        ),
        model=model,
        training_model=torch.compile(prepared_model) if resolved.system.compile else prepared_model,
        optimizer=optimizer,
        accelerator=accelerator,
        metrics=JsonLines(folder / "metrics.jsonl"),
        samples=JsonLines(folder / "samples.jsonl"),
    )
    if resumed is not None:
        restore(run, resumed)
    for log in (run.metrics, run.samples):
        log.cut_after(run.step if resumed is not None else -1)
    introduce(run, settled.derived)
    return run


def choose_tokenizer(
    config: RunConfig, resumed: Checkpoint | None, start: tuple[GPT2, Tokenizer] | None
) -> str | Tokenizer | None:
    """The tokenizer that a recipe names, or else that of the model it goes on from, or else what the text brings."""
    if config.tokenizer is not None:
        return config.tokenizer
    if resumed is not None:
        return Tokenizer.load(resumed.folder)
    return start[1] if start is not None else None


def check(config: ResolvedConfig, data: Prepared) -> None:
    """Refuse what only the text and the tokenizer can tell.

    Raises:
        ConfigError: the model knows fewer tokens than the tokenizer. DataError: too little text, or a prompt it cannot spell.
    """
    if (config.model.vocab_size or 0) < data.tokenizer.vocab_size:
        cause = f"{config.model.vocab_size} tokens, but the tokenizer has {data.tokenizer.vocab_size}"
        raise ConfigError(
            "vocabulary too small", where="model.vocab_size", cause=cause, fix="leave it out: the tokenizer decides"
        )
    check_length(data.train, config.seq_len, "training")
    if len(data.validation) < 2:
        raise DataError(
            "too little text",
            where="data",
            cause="nothing is left to validate on",
            fix="give more text, or data.validation",
        )
    check_prompt(len(data.tokenizer.encode(config.sample_prompt)), config.model, "sample_prompt")


def restore(run: Run, resumed: Checkpoint) -> None:
    """Weights, optimizer and counters of a checkpoint; order, dropout and learning rate follow from the step.

    Raises:
        CheckpointError: they are not this model's.
    """
    if resumed.state["run_id"] != run.run_id:
        cause = "it is a checkpoint of another run"
        raise CheckpointError("misplaced checkpoint", where=str(resumed.folder), cause=cause, fix="move it away")
    resumed.load_weights(run.model)
    resumed.load_optimizer(run.model, run.optimizer)
    if run.accelerator.scaler is not None and resumed.state.get("scaler"):
        run.accelerator.scaler.load_state_dict(resumed.state["scaler"])
    run.step, run.elapsed_seconds = resumed.state["step"], resumed.state["elapsed_seconds"]


def introduce(run: Run, derived: list[Derived]) -> None:
    """Say, once, what will run, on what, and every number that was derived."""
    config, say = run.config, run.console.say
    say(f"run      {run.folder} on {describe_machine(run.device)}, {config.system.precision}")
    learn, held = len(run.data.train), len(run.data.validation)
    say(f"text     {config.data.source}: {learn:,} tokens to learn from, {held:,} held out")
    for item in derived:
        say(f"derived  {item.key} = {item.value}: {item.reason}")
    work = flops_per_token(config.model, config.seq_len) / 1e6
    say(f"model    {run.model.num_parameters():,} parameters, {work:,.1f} MFLOP a token")
    passes = f"{run.batches.micro_steps} x {config.micro_batch} sequences of {config.seq_len}"
    left = f", going on after step {run.step}" if run.step else ""
    say(f"steps    {config.steps} of {config.batch_tokens:,} tokens ({passes}){left}")
