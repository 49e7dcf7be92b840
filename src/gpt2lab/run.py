"""A run before its first step: its folder opened, its model built, and where it left off restored."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock

from gpt2lab import checkpoint
from gpt2lab.checkpoint import Checkpoint
from gpt2lab.config import ResolvedConfig, RunConfig, to_yaml
from gpt2lab.data.batches import Batches
from gpt2lab.data.packing import Documents
from gpt2lab.data.prepare import open_again, prepare
from gpt2lab.data.prepared import Prepared, open_prepared
from gpt2lab.data.sources import described
from gpt2lab.data.stream.blocks import Block
from gpt2lab.data.stream.text import StreamedText, open_stream
from gpt2lab.distributed import Ranks
from gpt2lab.errors import CheckpointError, DataError
from gpt2lab.feed import last_block_before, open_samples
from gpt2lab.folder import (
    check_folder,
    inherit,
    lock_folder,
    note_sitting,
    open_folder,
    read_stored,
    refuse_differences,
    refuse_other_text,
)
from gpt2lab.health import SKIPS_WITHIN, Health
from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.plan import Derived, flops_per_token
from gpt2lab.recipe import build_config, parse_recipe
from gpt2lab.seeds import generator_for
from gpt2lab.settle import settle
from gpt2lab.strategy import Single, make_strategy
from gpt2lab.system import (
    describe_machine,
    make_accelerator,
    run_in,
)
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.tracking import Console, JsonLines, read_rows
from gpt2lab.writer import Writer


@dataclass
class Run:
    """A run that is set up: everything the loop touches.

    Attributes:
        config: with nothing left open.
        lock: on the run folder; in the main process only, as are `resumed` and what is written.
        model: as it is; `strategy.module` has the same weights, wrapped.
        step: optimizer steps done.
        elapsed_seconds: spent in steps, over all sittings.
        shift: batches that rollbacks have left out.
        health: what the last steps were like.
        rollbacks: how often each checkpoint was gone back to.
    """

    config: ResolvedConfig
    folder: Path
    lock: FileLock | None
    run_id: str
    console: Console
    ranks: Ranks
    tokenizer: Tokenizer
    data: Prepared | StreamedText
    batches: Batches
    model: GPT2
    strategy: Single
    accelerator: Accelerator
    metrics: JsonLines
    samples: JsonLines
    bad_batches: JsonLines
    writer: Writer
    step: int = 0
    elapsed_seconds: float = 0.0
    shift: int = 0
    health: Health = field(default_factory=Health)
    rollbacks: Counter[int] = field(default_factory=Counter)

    @property
    def borders(self) -> Borders:
        """What the borders of documents mean to the model."""
        data = self.config.data
        return Borders(self.tokenizer.end_of_text, data.attend_across, data.restart_positions)

    def recent_rows(self) -> list[dict[str, Any]]:
        """The last rows of metrics.jsonl, as the main process has them, in all processes."""
        path = self.metrics.path
        rows = list(read_rows(path))[-SKIPS_WITHIN:] if self.ranks.main and path.exists() else []
        about = [{key: row.get(key) for key in ("step", "loss", "skipped")} for row in rows]
        return list(json.loads(self.ranks.from_main(json.dumps(about), f"rows/{self.step}/{self.shift}")))

    def close(self) -> None:
        """Wait for what is being written, and let others into the folder."""
        self.batches.samples.close()
        self.writer.close()
        if self.lock is not None:
            self.lock.release()


def set_up(config: RunConfig, console: Console, ranks: Ranks) -> Run:
    """A run that is ready for its next step, new or where its folder left off.

    The main process decides, reads and writes; the others are told what they need.

    Raises:
        LabError: settings, text, weights or folder that cannot work; nothing that was there is changed.
    """
    folder = Path(config.out)
    if not ranks.main:
        return open_run(listen(ranks), folder, None, Console(quiet=True), ranks)
    check_folder(folder)
    with ExitStack() as on_failure:
        lock = lock_folder(folder) if folder.is_dir() else None
        if lock is not None:
            on_failure.callback(lock.release)
        run = open_run(decide(config, folder, console, ranks), folder, lock, console, ranks)
        on_failure.pop_all()
    return run


@dataclass(frozen=True)
class Opening:
    """What is known before a run is opened.

    Attributes:
        state: of the checkpoint that the run goes on from; None for a new one.
        before: a block of a stream, from whose end on it can be read; None: only from its start.
        resumed, start: that checkpoint, or the model to start from; in the main process only.
    """

    config: ResolvedConfig
    data: Prepared | StreamedText
    state: dict[str, Any] | None
    before: Block | None = None
    resumed: Checkpoint | None = None
    start: GPT2 | None = None
    derived: list[Derived] = field(default_factory=list)


def decide(config: RunConfig, folder: Path, console: Console, ranks: Ranks) -> Opening:
    """What the main process finds out about a run and its folder; it tells the others."""
    stored = read_stored(folder)
    if stored is not None:
        config = inherit(config, stored)
        refuse_differences(config, stored, folder, except_for=frozenset(["steps", "epochs"]))  # which may be open yet
    checkpoint.sweep(folder)
    resumed, troubles = checkpoint.latest(folder)
    for trouble in troubles:
        console.say(f"left aside: {trouble}")
    settled = settle(config, ranks, resumed)
    if stored is not None:
        refuse_differences(settled.config, stored, folder)
        refuse_other_text(folder, settled.data)
    start = settled.start[0] if settled.start is not None else None
    state = resumed.state if resumed is not None else None
    before = last_block_before(settled.config, folder, state) if isinstance(settled.data, StreamedText) else None
    told = {
        "recipe": to_yaml(settled.config),
        "text": str(settled.data.folder.absolute()),
        "fingerprint": settled.data.fingerprint,
        "files": settled.data.files if isinstance(settled.data, StreamedText) else [],
        "tokenizer": settled.data.tokenizer.to_json(),
        "state": state,
        "before": before.to_dict() if before is not None else None,
    }
    ranks.from_main(json.dumps(told), "opening")
    return Opening(settled.config, settled.data, state, before, resumed, start, settled.derived)


def listen(ranks: Ranks) -> Opening:
    """What the main process says; on another machine the text is prepared anew, once for all of its processes.

    Raises:
        DataError: the text there is another.
    """
    told = json.loads(ranks.from_main(None, "opening"))
    config = build_config(parse_recipe(told["recipe"], "the main process"))
    resolved = ResolvedConfig(**{item.name: getattr(config, item.name) for item in fields(config)})
    folder, tokenizer = Path(told["text"]), Tokenizer.from_json(told["tokenizer"])
    data: Prepared | StreamedText | None
    if resolved.data.stream and folder.is_dir():
        data = StreamedText(resolved.data, folder, tokenizer, open_prepared(folder).validation, told["files"])
    else:
        data = open_again(resolved.data, tokenizer, folder)
    if data is None or data.fingerprint != told["fingerprint"]:
        open_text = open_stream if resolved.data.stream else prepare
        data = ranks.one_here_first(lambda: open_text(resolved.data, tokenizer), "text")
    if data.fingerprint != told["fingerprint"]:
        cause = f"rank {ranks.rank} finds another text than the main process at {described(resolved.data.source)}"
        raise DataError("texts differ", where="data.source", cause=cause, fix="copy the text to every machine")
    before = Block.from_dict(told["before"]) if told["before"] else None
    return Opening(resolved, data, told["state"], before)


def open_run(opening: Opening, folder: Path, lock: FileLock | None, console: Console, ranks: Ranks) -> Run:
    """What `set_up` does once the folder is ours, or known to be new (then it is locked when it is made)."""
    resolved, data, device = opening.config, opening.data, ranks.device
    run_in(resolved.system, device, ranks.local_size)
    model = GPT2.from_config(resolved.model, generator=generator_for(resolved.seed, "weights"))
    if opening.resumed is not None:
        opening.resumed.load_weights(model)
    elif opening.start is not None:
        checkpoint.assign_weights(model, opening.start.state_dict(), str(resolved.init_from))
    model.to(device).train()
    ranks.same_in_all(model.parameters())
    accelerator = make_accelerator(resolved.system.precision, device)
    strategy = make_strategy(model, resolved, accelerator, ranks)
    if ranks.main:
        run_id = open_folder(folder, resolved, data)
        lock = lock or lock_folder(folder)
    else:
        run_id = ""
    ranks.watch.folder = folder
    run = Run(
        config=resolved,
        folder=folder,
        lock=lock,
        run_id=run_id,
        console=console,
        ranks=ranks,
        tokenizer=data.tokenizer,
        data=data,
        batches=Batches(
            open_samples(resolved, data, folder, ranks, opening.before),
            step_samples=resolved.batch_tokens // resolved.seq_len,
            micro_batch=resolved.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ),
        model=model,
        strategy=strategy,
        accelerator=accelerator,
        metrics=JsonLines(folder / "metrics.jsonl"),
        samples=JsonLines(folder / "samples.jsonl"),
        bad_batches=JsonLines(folder / "bad_batches.jsonl"),
        writer=Writer(folder, resolved.keep_checkpoints, console.say),
    )
    if opening.state is not None:
        restore(run, opening.resumed, opening.state, with_weights=False)
    if ranks.main:
        for log in (run.metrics, run.samples, run.bad_batches):
            log.cut_after(run.step if opening.state is not None else -1)
        if run.step < resolved.steps:
            note_sitting(folder, run.step, resolved, ranks)
    run.health = Health(run.recent_rows())
    introduce(run, opening.derived)
    return run


def restore(run: Run, resumed: Checkpoint | None, state: dict[str, Any], *, with_weights: bool = True) -> None:
    """Weights, optimizer and counters of a checkpoint; order, dropout and learning rate follow from the step.

    Args:
        resumed: the checkpoint, in the main process.
        with_weights: whether they are still to be loaded.

    Raises:
        CheckpointError: they are not this model's.
    """
    if resumed is not None and state["run_id"] != run.run_id:
        cause = "it is a checkpoint of another run"
        raise CheckpointError("misplaced checkpoint", where=str(resumed.folder), cause=cause, fix="move it away")
    if with_weights:
        run.strategy.load_weights(resumed.weights() if resumed is not None else None)
    run.strategy.load_optimizer(resumed.optimizer() if resumed is not None else None, f"{state['step']}/{run.shift}")
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step, run.elapsed_seconds = state["step"], state["elapsed_seconds"]
    run.shift = max(run.shift, state["shift"])


def introduce(run: Run, derived: list[Derived]) -> None:
    """Say, once, what will run, on what, and every number that was derived."""
    config, say = run.config, run.console.say
    shared = f", {run.ranks.world_size} processes ({config.system.strategy})" if run.ranks.world_size > 1 else ""
    exact = ", exact" if config.system.exact else ""
    say(f"run      {run.folder} on {describe_machine(run.ranks.device)}, {config.system.precision}{shared}{exact}")
    if isinstance(run.data, StreamedText):
        files = f"{len(run.data.files):,} files" if len(run.data.files) > 1 else "one file"
        learn = f"streamed from {files}, in blocks of {config.data.window_tokens:,} tokens"
    else:
        learn = f"{len(run.data.train):,} tokens to learn from"
    say(f"text     {described(config.data.source)}: {learn}, {len(run.data.validation):,} held out")
    if isinstance(samples := run.batches.samples, Documents):
        say(f"packing  whole documents in {samples.per_epoch:,} samples an epoch, {samples.padding:.1%} of it padding")
    for item in derived:
        say(f"derived  {item.key} = {item.value}: {item.reason}")
    work = flops_per_token(config.model, config.seq_len) / 1e6
    say(f"model    {run.model.num_parameters():,} parameters, {work:,.1f} MFLOP a token")
    passes = f"{run.batches.passes} x {config.micro_batch} sequences of {config.seq_len}"
    left = f", going on after step {run.step}" if run.step else ""
    say(f"steps    {config.steps} of {config.batch_tokens:,} tokens ({passes}){left}")
