"""What a run learns from, brought to it: samples of a prepared text, or of a stream whose next blocks are waited for."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from gpt2lab.config import ResolvedConfig
from gpt2lab.data.batches import Batches
from gpt2lab.data.packing import make_samples
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.samples import Samples
from gpt2lab.data.stream.blocks import Block, Journal
from gpt2lab.data.stream.samples import Streamed
from gpt2lab.data.stream.text import StreamedText
from gpt2lab.data.stream.window import Bringer, Window
from gpt2lab.distributed import Ranks
from gpt2lab.errors import DataError, LabError
from gpt2lab.system import StopSignals

JOURNAL, BLOCKS = "stream.jsonl", "stream"
"""Of a run folder: where in its source each block of a stream begins; and the blocks themselves, a few at a time."""
_PERIOD = 0.02  # seconds between two looks


def open_samples(
    config: ResolvedConfig, data: Prepared | StreamedText, folder: Path, ranks: Ranks, before: Block | None
) -> Samples:
    """What a run learns from.

    Args:
        folder: of the run.
        before: a block of the stream, from whose end on this machine can begin to read; None: from the start.
    """
    if isinstance(data, Prepared):
        return make_samples(config.data, data.train, config.seq_len, config.seed, data.tokenizer.end_of_text)
    per_block = _per_block(config)
    place = folder / BLOCKS / f"rank-{ranks.rank - ranks.local_rank}"  # of the first process on this machine
    if ranks.local_rank > 0:
        return Streamed(Window(place), config.seq_len, per_block, config.seed)
    journal = Journal(folder / JOURNAL if ranks.main else None)
    if before is not None:
        journal.blocks.setdefault(before.number, before)
    bringer = Bringer(place, data.job(config.seed, per_block * config.seq_len), journal)
    return Streamed(bringer, config.seq_len, per_block, config.seed)


def last_block_before(config: ResolvedConfig, folder: Path, state: dict[str, Any] | None) -> Block | None:
    """The block of a run's stream from whose end on a machine without a journal can bring what the next step needs."""
    index = (state["step"] + state["shift"]) * (config.batch_tokens // config.seq_len) if state is not None else 0
    return Journal(folder / JOURNAL).before(index // _per_block(config))


def _per_block(config: ResolvedConfig) -> int:
    """Samples in a block, no fewer than in a step: a step then lies in no more than two."""
    return -(-max(config.data.window_tokens, config.batch_tokens) // config.seq_len)


def await_text(batches: Batches, step: int, ranks: Ranks, stop: StopSignals) -> bool:
    """Wait until the text of a step is there. All processes return together: False where one of them was asked to stop.

    Args:
        step: counts from 0.

    Raises:
        LabError: it will never be there; in all processes.
    """
    samples = batches.samples
    if not isinstance(samples, Streamed):
        return True
    window, block = samples.window, samples.block(batches.step_indices(step)[-1])
    if block <= window.newest:
        return True
    problem = None
    try:
        while not window.has(block) and stop.received is None:
            ranks.watch.waiting()
            time.sleep(_PERIOD)
    except LabError as error:
        problem = error
    if ranks.any(problem is not None):
        elsewhere = DataError("text not read", where="data.source", cause="another machine cannot", fix="what it says")
        raise problem or elsewhere
    window.newest = block
    return not ranks.any(stop.received is not None)


def remove_blocks(samples: Samples) -> None:
    """Free the disk of the blocks of a stream that is not needed any more; whoever needs them has them made again."""
    samples.close()
    if isinstance(samples, Streamed) and isinstance(samples.window, Bringer):
        shutil.rmtree(samples.window.folder, ignore_errors=True)
