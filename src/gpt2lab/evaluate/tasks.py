"""The tasks of ``gpt2lab eval``, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2lab.checkpoint import CONFIG
from gpt2lab.data.prepare import prepare
from gpt2lab.data.sources import read_documents
from gpt2lab.data.stream.text import open_stream
from gpt2lab.errors import ConfigError
from gpt2lab.evaluate.perplexity import Passages, document_passages, held_out_passages, perplexity
from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.recipe import build_config, read_recipe
from gpt2lab.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """What is evaluated on what.

    Attributes:
        borders: what documents' borders mean to the model, as in its training; None: nothing.
    """

    model: GPT2
    text: Passages
    seq_len: int
    stride: int | None
    borders: Borders | None = None


def _perplexity(subject: Subject) -> dict[str, Any]:
    found = perplexity(subject.model, subject.text, subject.seq_len, subject.stride, borders=subject.borders)
    return asdict(found)


TASKS: dict[str, Callable[[Subject], dict[str, Any]]] = {"perplexity": _perplexity}


def evaluate(
    name: str,
    model: GPT2,
    tokenizer: Tokenizer,
    tasks: list[str],
    *,
    data: str | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """The results of each task by its name.

    Args:
        name: where the model came from; a run's held-out text is found through it.
        data: the text; None: the run's held-out text.
        stride: tokens from window to window; None: the whole context, the cheapest.

    Raises:
        ConfigError: no such task, a stride beyond the context, or no text. DataError: the text cannot be used.
    """
    for task in tasks or [""]:
        if task not in TASKS:
            raise ConfigError("no such task", where="--tasks", cause=repr(task), fix=f"one of {', '.join(TASKS)}")
    config_file = Path(name) / CONFIG
    settings = read_recipe(config_file) if config_file.is_file() else {}
    run = build_config(settings) if "data.source" in settings else None
    seq_len = (run.seq_len if run else None) or model.max_seq_len
    if stride is not None and not 1 <= stride <= seq_len:
        raise ConfigError(
            "out of range", where="--stride", cause=f"{stride}, with a context of {seq_len}", fix=f"1 to {seq_len}"
        )
    if data is not None:
        text = document_passages(read_documents(data), tokenizer)
    elif run is not None:
        open_text = open_stream if run.data.stream else prepare
        prepared = open_text(run.data, run.tokenizer or tokenizer)
        if prepared.tokenizer.fingerprint != tokenizer.fingerprint:  # learned from a text that has changed since
            prepared = open_text(run.data, tokenizer)
        text = held_out_passages(prepared.validation, tokenizer, run.data.validation_tokens)
    else:
        raise ConfigError("no text", where=name, cause="this model has no held-out text of its own", fix="--data=FILE")
    borders = None
    if run is not None:
        borders = Borders(tokenizer.end_of_text, run.data.attend_across, run.data.restart_positions)
    subject = Subject(model, text, seq_len, stride, borders)
    return {task: TASKS[task](subject) for task in tasks}
