"""Checkpoints of a run, written while training goes on: the tensors are copied, and a thread does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lab import checkpoint
from gpt2lab.checkpoint import FILE_BYTES
from gpt2lab.errors import as_lab_error
from gpt2lab.manifest import Seen
from gpt2lab.tokenizer import Tokenizer

TRIES = 3
"""So many checkpoints in a row may fail in the background before training ends."""


class Writer:
    """Writes, verifies and rotates the checkpoints of a run, one at a time.

    Args:
        keep: see `checkpoint.rotate`.
        say: gets a line when a checkpoint could not be written and training goes on; from another thread.
    """

    def __init__(self, run: Path, keep: int, say: Callable[[str], object]) -> None:
        self._run, self._keep, self._say = run, keep, say
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None
        self._failures = 0
        self._seen: Seen = {}
        self._buffers: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._job is not None and not self._job.done()

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor] | None,
        *,
        recipe: str,
        tokenizer: Tokenizer,
        state: Mapping[str, Any],
        file_bytes: int = FILE_BYTES,
        background: bool,
    ) -> None:
        """The checkpoint of a step, after the one before it; see `checkpoint.save`.

        Args:
            background: return when the tensors are copied. When the disk is full then, the next checkpoint is another try.

        Raises:
            LabError, OSError: this one failed, or the one before it in the background and too many in a row.
        """
        if background:
            self.wait()
        elif self._job is not None:
            self._job.exception()  # waits: whatever became of that one, this one is tried
            self._job = None
        if background:
            weights = self._copy("weights", weights)
            optimizer = self._copy("optimizer", optimizer) if optimizer is not None else None
        folder = checkpoint.step_folder(self._run, step)
        write = partial(
            checkpoint.save, folder, weights, recipe=recipe, tokenizer=tokenizer, optimizer=optimizer,
            state=dict(state), file_bytes=file_bytes, seen=self._seen,
        )  # fmt: skip
        if background:
            self._job = self._thread.submit(self._try, folder, write)
        else:
            self._write(write)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            LabError, OSError: what ended the last one, where training should end too.
        """
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """The end: as `wait`, and the thread is gone."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, write: Callable[[], object]) -> None:
        write()
        checkpoint.rotate(self._run, self._keep, self._seen)
        self._failures = 0

    def _try(self, folder: Path, write: Callable[[], object]) -> None:
        """Write in the thread; a disk that fails now may have room, or be back, at the next checkpoint."""
        try:
            self._write(write)
        except OSError as error:
            self._failures += 1
            if self._failures == TRIES:
                raise
            trouble = as_lab_error(error) or error
            self._say(f"saving {folder.name} failed ({self._failures} of {TRIES} tries), training goes on: {trouble}")

    def _copy(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in memory that is kept from one checkpoint to the next: the system takes long to give out new memory."""
        before = self._buffers[kind]
        self._buffers[kind] = copies = {
            name: before[name]
            if name in before and (before[name].shape, before[name].dtype) == (tensor.shape, tensor.dtype)
            else torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            copies[name].copy_(tensor.detach())
        return copies
