"""The loop: one optimizer step after another, and once in a while a validation, a sample, a checkpoint."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, cast

import torch

from gpt2lab import checkpoint
from gpt2lab.config import RunConfig
from gpt2lab.errors import Interrupted, NumbersError
from gpt2lab.evaluate.perplexity import perplexity, shard_tokens
from gpt2lab.folder import portable_recipe
from gpt2lab.generation import generate
from gpt2lab.model.moe import Routing
from gpt2lab.optim import learning_rate
from gpt2lab.run import Run, set_up
from gpt2lab.seeds import derive
from gpt2lab.system import StopSignals, peak_memory_bytes
from gpt2lab.tracking import Console, clock, size

SAMPLE_TOKENS = 100


def train(config: RunConfig, console: Console) -> Path:
    """Start a run, or go on where its folder left off; return the folder.

    Raises:
        Interrupted: a signal came; a checkpoint of the step it came in was written.
        NumbersError: the loss or the gradient is not finite; nothing was updated with it.
        LabError: any other problem, before anything is trained.
    """
    with StopSignals() as stop:
        run = set_up(config, console)
        try:
            return loop(run, stop)
        finally:
            run.lock.release()


def loop(run: Run, stop: StopSignals) -> Path:
    """One step after another, in the order in which things happen."""
    config, first, steps = run.config, run.step, run.config.steps
    for step in range(first, steps + 1):
        run.step, last = step, step == steps
        row: dict[str, Any] = {"step": step, "tokens": step * config.batch_tokens}
        if step > first:
            row |= train_step(run)

        # once in a while: how well does it do on text it does not learn from? (also before the first step)
        if (step > first and (last or due(step, config.validate_every))) or step == 0:
            row |= validate(run)
        if step > first or step == 0:
            run.metrics.append(row)
            report(run, row)

        # once in a while: what does it write?
        if step > first and (last or due(step, config.sample_every)):
            sample(run)

        # once in a while: nothing that was learned so far can be lost
        if step > first and (last or stop.received or due(step, config.checkpoint_every)):
            save(run)
        if stop.received and not last:
            raise Interrupted(
                f"stopped by {stop.received}",
                where=str(run.folder),
                cause=f"{step} of {steps} steps are done and saved" if step else "nothing was trained yet",
                fix="give the same command again: it goes on from there",
            )
    run.console.say(f"complete: {steps} steps in {run.folder}" + (", nothing left to do" if first == steps else ""))
    return run.folder


def due(step: int, every: int) -> bool:
    """Whether it is time for what happens every so many steps; 0: never."""
    return every > 0 and step % every == 0


def train_step(run: Run) -> dict[str, Any]:
    """Optimizer step number ``run.step``, from 1: gradients summed over the micro-batches, clipped, applied."""
    config, started = run.config, time.perf_counter()
    loss = torch.zeros((), device=run.device)
    routings: list[Routing] = []
    for micro_step in range(run.batches.micro_steps):
        token_ids, targets = (ids.to(run.device, non_blocking=True) for ids in run.batches(run.step - 1, micro_step))
        torch.manual_seed(derive(config.seed, "dropout", run.step, micro_step))
        # A sum over tokens, divided by the tokens of the whole step: however the step is split, the loss is the same.
        routing = Routing() if config.model.num_experts > 1 else None
        micro_loss = run.training_model(token_ids, targets, routing=routing).sum() / config.batch_tokens
        loss += micro_loss.detach()
        if (
            routing is not None
        ):  # what keeps the routers even is minimised too, but is no part of the loss that is reported
            balance = config.optim.balance_weight * routing.balance_loss + config.optim.z_weight * routing.z_loss
            micro_loss = micro_loss + balance / run.batches.micro_steps
            routings.append(routing)
        run.accelerator.backward(micro_loss)
    grad_norm = run.accelerator.clip_grad_norm_(run.model.parameters(), config.optim.clip or math.inf)
    rate = learning_rate(run.step, config.steps, config.optim)
    row = {"loss": loss.item(), "learning_rate": rate, "grad_norm": grad_norm.item()} | report_routing(routings)
    refuse_bad_numbers(run, row)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds = time.perf_counter() - started
    run.elapsed_seconds += seconds
    return row | {"tokens_per_second": config.batch_tokens / seconds, "elapsed_seconds": run.elapsed_seconds}


def report_routing(routings: list[Routing]) -> dict[str, Any]:
    """What the routers did in a step: both losses as means, and the tokens of each expert, layer by layer; {} without any."""
    if not routings:
        return {}
    counts = sum(torch.stack(routing.counts) for routing in routings)
    return {
        "balance_loss": torch.stack([routing.balance_loss for routing in routings]).mean().item(),
        "router_z_loss": torch.stack([routing.z_loss for routing in routings]).mean().item(),
        "expert_counts": cast(torch.Tensor, counts).tolist(),
    }


def refuse_bad_numbers(run: Run, row: dict[str, Any]) -> None:
    """Stop before an update that would spoil the weights. In fp16 an overflow is usual: the scaler skips it."""
    if math.isfinite(row["loss"]) and (math.isfinite(row["grad_norm"]) or run.accelerator.scaler is not None):
        return
    raise NumbersError(
        "numbers went bad",
        where=f"{run.folder}, step {run.step}",
        cause=f"loss {row['loss']}, gradient norm {row['grad_norm']}; the checkpoints before it are untouched",
        fix="lower optim.learning_rate, lengthen optim.warmup_steps, or use --system.precision=fp32",
    )


def validate(run: Run) -> dict[str, float]:
    """Loss and perplexity on the held-out text, and the memory that was needed so far."""
    tokens, num_bytes = shard_tokens(run.data.validation, run.tokenizer, run.config.data.validation_tokens)
    result = perplexity(run.model, tokens, num_bytes, run.config.seq_len)
    return {
        "val_loss": result.loss,
        "val_perplexity": result.perplexity,
        "peak_memory_bytes": peak_memory_bytes(run.device),
    }


def sample(run: Run) -> None:
    """What the model writes now, into samples.jsonl."""
    prompt = run.config.sample_prompt
    [written] = generate(run.model, run.tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, seed=run.config.seed)
    run.samples.append({"step": run.step, "prompt": prompt, "text": written.text})


def save(run: Run) -> None:
    """A checkpoint of this step; then the oldest ones are removed."""
    run.metrics.sync()
    scaler = run.accelerator.scaler
    state = {
        "step": run.step,
        "tokens": run.step * run.config.batch_tokens,
        "elapsed_seconds": run.elapsed_seconds,
        "run_id": run.run_id,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    folder = checkpoint.step_folder(run.folder, run.step)
    recipe = portable_recipe(run.config)
    checkpoint.save(folder, run.model, optimizer=run.optimizer, recipe=recipe, tokenizer=run.tokenizer, state=state)
    checkpoint.rotate(run.folder, run.config.keep_checkpoints)


def report(run: Run, row: dict[str, Any]) -> None:
    """One line for a person: loss, speed, time left; a line that stays for a validation."""
    steps, final = run.config.steps, run.step == run.config.steps
    text = f"step {run.step:{len(str(steps))}}/{steps}"
    if "loss" in row:
        left = clock(run.elapsed_seconds / run.step * (steps - run.step))
        text += f"  loss {row['loss']:.4f}  lr {row['learning_rate']:.1e}"
        text += f"  {row['tokens_per_second']:,.0f} tok/s  {left} left"
    if "val_loss" in row:
        memory = size(row["peak_memory_bytes"])
        run.console.say(
            f"{text}  val {row['val_loss']:.4f}  perplexity {row['val_perplexity']:,.2f}  peak memory {memory}"
        )
    else:
        run.console.progress(text, final=final)
