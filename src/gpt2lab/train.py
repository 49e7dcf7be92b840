"""The loop: one optimizer step after another, and once in a while a validation, a sample, a checkpoint."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lab import checkpoint
from gpt2lab.config import GPT2Config, RunConfig
from gpt2lab.distributed import Ranks, join
from gpt2lab.errors import Interrupted, LabError, NumbersError, is_out_of_memory
from gpt2lab.evaluate.perplexity import Perplexity, held_out_passages
from gpt2lab.evaluate.scoring import token_losses
from gpt2lab.feed import await_text, remove_blocks
from gpt2lab.folder import portable_recipe
from gpt2lab.generation import generate
from gpt2lab.health import Health, describe_batch, is_bad, refuse_differing_replicas
from gpt2lab.model.moe import Routing
from gpt2lab.optim import learning_rate
from gpt2lab.plan import explain
from gpt2lab.run import Run, restore, set_up
from gpt2lab.seeds import derive
from gpt2lab.system import StopSignals, peak_memory_bytes, reachable_memory_bytes
from gpt2lab.tracking import Console, clock, size

SAMPLE_TOKENS = 100
MOST_ROLLBACKS = 3
"""To one checkpoint: a loss that jumps again after each of them will not be cured by leaving out text."""


def train(config: RunConfig, console: Console) -> Path:
    """Start a run, or go on where its folder left off; return the folder.

    Raises:
        Interrupted: a signal came; a checkpoint of the step it came in was written.
        NumbersError: too many steps were not finite, or replicas differ. ProcessError: another process died or hangs.
        LabError: any other problem, before anything is trained.
    """
    with StopSignals() as stop, join(config, stop) as ranks:
        run = set_up(config, console, ranks)
        try:
            return loop(run, stop)
        except Exception as error:
            if is_out_of_memory(error):
                memory = reachable_memory_bytes(ranks.device)
                raise explain(run.config, memory, ranks.device.type, ranks.world_size) from error
            raise
        finally:
            run.close()


def loop(run: Run, stop: StopSignals, until: int | None = None) -> Path:
    """One step after another, in the order in which things happen, to the last or only to step `until`."""
    config, ranks, steps = run.config, run.ranks, until or run.config.steps
    if run.step == 0:
        record(run, {"step": 0, "tokens": 0} | validate(run))
    first, last = run.step, run.step == steps
    stopping = ranks.any(stop.received is not None)
    while not (last or stopping):
        # once in a while: a stream brings its next text; whether or not it can, nothing that was learned is lost
        try:
            stopping = not await_text(run.batches, run.step + run.shift, ranks, stop)
        except LabError:
            save_progress(run, first)
            raise
        if stopping:
            save_progress(run, first)
            break

        run.step, last = run.step + 1, run.step + 1 == steps
        row = train_step(run)
        if row.get("spike") and config.on_spike == "rollback" and roll_back(run, row):
            last = False
            continue

        # once in a while: how well does it do on text it does not learn from?
        if last or due(run.step, config.validate_every):
            row |= validate(run)
        record(run, row)
        run.health.refuse_too_many_skips(config.skip_limit, f"{run.folder}, step {run.step}")

        # once in a while: what does it write?
        if last or due(run.step, config.sample_every):
            sample(run)

        # once in a while: are the copies of the model still the same?
        if due(run.step, config.system.compare_every):
            compare_replicas(run)

        # once in a while: nothing that was learned so far can be lost
        ranks.at(run.step, "agree")
        stopping = ranks.any(stop.received is not None)
        if last or stopping or due(run.step, config.checkpoint_every):
            save(run, row, wait=last or stopping)
    if not last:
        done = f"{run.step} of {steps} steps are done and saved" if run.step else "nothing was trained yet"
        raise Interrupted(
            f"stopped by {stop.received or 'a signal to another process'}",
            where=str(run.folder),
            cause=done,
            fix="give the same command again: it goes on from there",
        )
    remove_blocks(run.batches.samples)
    run.console.say(f"complete: {steps} steps in {run.folder}" + (", nothing left to do" if first == steps else ""))
    return run.folder


def due(step: int, every: int) -> bool:
    """Whether it is time for what happens every so many steps; 0: never."""
    return every > 0 and step % every == 0


def train_step(run: Run) -> dict[str, Any]:
    """Optimizer step number ``run.step``, from 1: gradients summed over all passes of all processes, clipped, applied."""
    config, ranks, batches, strategy = run.config, run.ranks, run.batches, run.strategy
    started, index = time.perf_counter(), run.step - 1 + run.shift
    num_targets = max(1, batches.num_targets(index))
    figures = Figures(batches.passes, config.model, ranks.device)
    for micro_step in range(batches.micro_steps):
        ranks.at(run.step, f"text of pass {micro_step}")
        number = batches.number(micro_step)
        token_ids, targets = (ids.to(ranks.device, non_blocking=True) for ids in batches(index, micro_step))
        ranks.at(run.step, f"pass {micro_step}")
        torch.manual_seed(derive(config.seed, "dropout", index + 1, number))
        routing = Routing() if config.model.num_experts > 1 else None
        with strategy.one_pass(last=micro_step == batches.micro_steps - 1):
            losses = strategy.module(token_ids, targets, routing=routing, **run.borders(token_ids))
            # A sum over targets, divided by those of the whole step: however the step is split, the loss is the same.
            loss = losses.sum() / num_targets
            scored = number < batches.passes
            if routing is not None:  # what keeps the routers even is minimised too, but is no part of the loss reported
                balance = config.optim.balance_weight * routing.balance_loss + config.optim.z_weight * routing.z_loss
                loss = loss + balance * (scored / batches.passes)
                routing.closed = True
            if scored:
                figures.note(number, losses, routing)
            strategy.backward(loss)
    ranks.at(run.step, "gradients")
    grad_norm = strategy.grad_norm().item()
    row = figures.row(ranks, num_targets) | {
        "learning_rate": learning_rate(run.step, config.steps, config.optim),
        # An overflow of fp16 is usual, and JSON has no Infinity.
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
    }
    ranks.at(run.step, "update")
    if is_bad(row["loss"], grad_norm, scaled=run.accelerator.scaler is not None):
        strategy.skip()
        row |= keep_bad_batch(run, figures, f"loss {row['loss']}, gradient norm {grad_norm}", index)
    else:
        strategy.step(row["learning_rate"], grad_norm)
        row |= {"spike": score} if (score := run.health.spike(row["loss"])) else {}
    row |= {"shift": run.shift} if run.shift else {}
    seconds = time.perf_counter() - started
    run.elapsed_seconds += seconds
    return {
        "step": run.step, "tokens": run.step * config.batch_tokens, **row,
        "tokens_per_second": config.batch_tokens / seconds, "elapsed_seconds": run.elapsed_seconds,
    }  # fmt: skip


class Figures:
    """What a step is reported with: a row for each of its passes, filled by one process, so that their sum is exact."""

    def __init__(self, passes: int, model: GPT2Config, device: torch.device) -> None:
        self._layers, self._experts = model.num_layers, model.num_experts if model.num_experts > 1 else 0
        width = 3 + self._layers * self._experts
        dtype = torch.float64 if device.type != "mps" else torch.float32
        self._table = torch.zeros(passes, width, dtype=dtype, device=device)

    def note(self, number: int, losses: Tensor, routing: Routing | None) -> None:
        """A pass: the sum of its losses, and what its routers did."""
        self._table[number, 0] = losses.detach().to(self._table.dtype).sum()
        if routing is not None:
            self._table[number, 1], self._table[number, 2] = routing.balance_loss.detach(), routing.z_loss.detach()
            self._table[number, 3:] = torch.cat(routing.counts)

    def row(self, ranks: Ranks, num_targets: int) -> dict[str, Any]:
        """The step's loss; with experts also both router losses as means, and the tokens of each expert, layer by layer."""
        self._table = ranks.sum(self._table).cpu()
        row: dict[str, Any] = {"loss": self._table[:, 0].sum().item() / num_targets}
        if self._experts:
            balance, z = self._table[:, 1:3].mean(dim=0).tolist()
            counts = self._table[:, 3:].sum(dim=0).long().view(self._layers, self._experts)
            row |= {"balance_loss": balance, "router_z_loss": z, "expert_counts": counts.tolist()}
        return row

    @property
    def losses(self) -> list[float]:
        """The sum of the losses of each pass, once the row is made."""
        return [float(loss) for loss in self._table[:, 0].tolist()]


def keep_bad_batch(run: Run, figures: Figures, what: str, index: int) -> dict[str, Any]:
    """Write down what a step that is not finite was to learn from; return what its row says instead."""
    if run.ranks.main:
        about = {"step": run.step, "processes": run.ranks.world_size, "reason": what}
        run.bad_batches.append(describe_batch(run.batches, run.tokenizer, index, figures.losses, about))
        run.console.say(f"step {run.step} skipped: {what}; its text is in {run.bad_batches.path}")
    return {"loss": None, "grad_norm": None, "skipped": what}  # JSON has no NaN


def roll_back(run: Run, row: dict[str, Any]) -> bool:
    """Go back to the last checkpoint and leave out the text since then; False where there is none, or it did not help."""
    run.ranks.at(run.step, "rollback")
    if run.ranks.main:
        run.writer.wait()
        found, _ = checkpoint.latest(run.folder)
    else:
        found = None
    back = json.loads(
        run.ranks.from_main(json.dumps(found.state if found else None), f"rollback/{run.step}/{run.shift}")
    )
    if back is None or run.rollbacks[back["step"]] >= MOST_ROLLBACKS:
        return False
    spiked, run.rollbacks[back["step"]] = run.step, run.rollbacks[back["step"]] + 1
    run.shift += spiked - back["step"]
    restore(run, found, back)
    if run.ranks.main:
        run.metrics.cut_after(run.step)
        run.bad_batches.append(
            {"step": spiked, "reason": f"spike {row['spike']:.1f}", "loss": row["loss"], "back_to": run.step}
        )
    run.health = Health(run.recent_rows())
    run.console.say(
        f"step {spiked}: loss {row['loss']:.4f} is a spike; back to step {run.step}, past the text since then"
    )
    return True


def compare_replicas(run: Run) -> None:
    """End the run where copies of the model have drifted apart: the memory or arithmetic of one process is broken.

    Raises:
        NumbersError: they differ.
    """
    run.ranks.at(run.step, "compare")
    if run.ranks.world_size > 1:
        refuse_differing_replicas(run.ranks.gather_line(run.strategy.digest()), run.step)


def validate(run: Run) -> dict[str, float]:
    """Loss and perplexity on the held-out text, and the memory that was needed so far; each process scores a share."""
    ranks, config = run.ranks, run.config
    text = held_out_passages(run.data.validation, run.tokenizer, config.data.validation_tokens)
    losses = token_losses(
        run.model, text.token_ids, config.seq_len, lengths=text.lengths, borders=run.borders,
        rank=ranks.rank, world_size=ranks.world_size,
        on_batch=lambda: ranks.at(run.step, "validate"),
    )  # fmt: skip
    losses = ranks.sum(torch.from_numpy(losses)).numpy()
    result = Perplexity.of(losses[text.scored], text.bytes)
    return {
        "val_loss": result.loss,
        "val_perplexity": result.perplexity,
        "peak_memory_bytes": peak_memory_bytes(ranks.device),
    }


def sample(run: Run) -> None:
    """What the model writes now, into samples.jsonl; where it lies in shards, all processes write the same."""
    run.ranks.at(run.step, "sample")
    if not (run.ranks.main or run.config.system.strategy == "fsdp"):
        return
    prompt = run.config.sample_prompt
    try:
        [written] = generate(run.model, run.tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, seed=run.config.seed)
    except NumbersError:  # the next loss says so too, and what to do about it
        return
    if run.ranks.main:
        run.samples.append({"step": run.step, "prompt": prompt, "text": written.text})


def save(run: Run, row: dict[str, Any], *, wait: bool) -> None:
    """A checkpoint of this step, written while training goes on unless asked to `wait`; then the oldest are removed."""
    run.ranks.at(run.step, "save")
    weights, optimizer = run.strategy.weights(), run.strategy.optimizer_state()
    if not run.ranks.main:
        return
    run.metrics.sync()
    scaler = run.accelerator.scaler
    state = {
        "step": run.step,
        "tokens": run.step * run.config.batch_tokens,
        "elapsed_seconds": run.elapsed_seconds,
        "run_id": run.run_id,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "val_loss": row.get("val_loss"),
        "processes": run.ranks.world_size,
        "strategy": run.config.system.strategy,
        "skipped": run.health.skipped,
        "shift": run.shift,
    }
    run.writer.save(
        run.step, weights, optimizer, recipe=portable_recipe(run.config), tokenizer=run.tokenizer, state=state,
        file_bytes=run.config.checkpoint_file_bytes, background=run.config.checkpoint_in_background and not wait,
    )  # fmt: skip


def save_progress(run: Run, first: int) -> None:
    """A checkpoint between two steps, unless there is one of this step: the sitting's first, or one that was due."""
    if run.step > first and not due(run.step, run.config.checkpoint_every):
        save(run, {}, wait=True)


def record(run: Run, row: dict[str, Any]) -> None:
    """A row for programs, and a line for people."""
    if row["step"]:
        run.health.note(row)
    if run.ranks.main:
        run.metrics.append(row)
        report(run, row)


def report(run: Run, row: dict[str, Any]) -> None:
    """One line for a person: loss, speed, time left; a line that stays for a validation."""
    steps, final = run.config.steps, run.step == run.config.steps
    text = f"step {run.step:{len(str(steps))}}/{steps}"
    if row.get("loss") is not None:
        left = clock(run.elapsed_seconds / run.step * (steps - run.step))
        text += f"  loss {row['loss']:.4f}  lr {row['learning_rate']:.1e}"
        text += f"  {row['tokens_per_second']:,.0f} tok/s  {left} left"
        where = run.batches.samples.where(run.batches.step_indices(run.step - 1 + run.shift)[-1])
        text += f"  {where}" if where else ""
    for news in run.batches.samples.news():
        run.console.say(news)
    if "spike" in row:
        run.console.say(
            f"step {run.step}: loss {row['loss']:.4f} is a spike, {row['spike']:.1f} deviations above the last ones"
        )
    if "val_loss" in row:
        memory = size(row["peak_memory_bytes"])
        run.console.say(
            f"{text}  val {row['val_loss']:.4f}  perplexity {row['val_perplexity']:,.2f}  peak memory {memory}"
        )
    else:
        run.console.progress(text, final=final)
