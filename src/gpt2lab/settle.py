"""Settings with nothing left open: what a recipe leaves to this machine, to the text and to the model it starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpt2lab import weights
from gpt2lab.checkpoint import Checkpoint
from gpt2lab.config import GPT2Config, ResolvedConfig, RunConfig
from gpt2lab.data.packing import Documents
from gpt2lab.data.prepare import prepare
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.samples import check_length
from gpt2lab.data.stream.text import StreamedText, open_stream
from gpt2lab.distributed import Ranks
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.generation.texts import check_prompt
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.plan import Derived, Plan, explain, make_plan, memory_bytes, resolve
from gpt2lab.rendezvous import place
from gpt2lab.strategy import check_strategy, choose_strategy
from gpt2lab.system import available_memory_bytes, choose_device, choose_precision, product_rate
from gpt2lab.tokenizer import Tokenizer

MEMORY_MARGIN = 1.1
"""What a step holds is known to a tenth: what needs less than this times the free memory is tried."""


@dataclass(frozen=True)
class Settled:
    """Settings with nothing left open, and what had to be opened to know them.

    Attributes:
        start: the model to start from and its tokenizer, where one is named.
        derived: what was left open, and why it became what it is.
    """

    config: ResolvedConfig
    device: torch.device
    data: Prepared | StreamedText
    start: tuple[GPT2, Tokenizer] | None
    derived: list[Derived]
    world_size: int


def settle(config: RunConfig, ranks: Ranks | None = None, resumed: Checkpoint | None = None) -> Settled:
    """Decide everything that a recipe leaves open, on this machine; the text is prepared, and nothing is trained.

    Args:
        ranks: the processes that will train; None: those that the settings ask for.

    Raises:
        LabError: settings, text or weights that cannot work.
    """
    device = ranks.device if ranks is not None else choose_device(config.system.device)
    world = ranks.world_size if ranks is not None else max(config.system.num_processes or 1, place()[1])
    here = ranks.local_size if ranks is not None else world
    start = weights.open_whole(config.init_from) if config.init_from and resumed is None else None
    if start is not None and config.model == GPT2Config():
        config = replace(config, model=start[0].config)
    tokenizer = choose_tokenizer(config, resumed, start)
    data = open_stream(config.data, tokenizer) if config.data.stream else prepare(config.data, tokenizer)
    train_tokens = len(data.train) if isinstance(data, Prepared) else 0  # then the steps are given
    memory = available_memory_bytes(device) // (here if device.type == "cpu" else 1)
    resolved, derived = resolve(
        config, data.tokenizer.vocab_size, train_tokens, device.type, memory, world,
        per_epoch=samples_per_epoch(config, data),
    )  # fmt: skip
    check(resolved, data)
    tokens = resolved.micro_batch * resolved.seq_len
    precision, reason = choose_precision(resolved.system, resolved.model, tokens, device)
    if resolved.system.precision == "auto":
        derived.append(Derived("system.precision", precision, reason))
    strategy = choose_strategy(config.system.strategy, world)
    system = replace(resolved.system, precision=precision, strategy=strategy, num_processes=here)
    resolved = replace(resolved, system=system)
    check_strategy(resolved, world, device.type)
    if ranks is not None and memory_bytes(resolved, device.type, world)["total"] > MEMORY_MARGIN * memory:
        raise explain(resolved, memory, device.type, world)
    return Settled(resolved, device, data, start, derived, world)


def forecast(config: RunConfig) -> tuple[Plan, Settled]:
    """What a run would need on this machine."""
    settled = settle(config)
    resolved, tokens = settled.config, settled.config.micro_batch * settled.config.seq_len
    rate = product_rate(resolved.system.precision, resolved.model, tokens, settled.device)
    return make_plan(resolved, rate, settled.device.type, settled.world_size), settled


def choose_tokenizer(
    config: RunConfig, resumed: Checkpoint | None, start: tuple[GPT2, Tokenizer] | None
) -> str | Tokenizer | None:
    """The tokenizer that a recipe names, or else that of the model it goes on from, or else what the text brings."""
    if config.tokenizer is not None:
        return config.tokenizer
    if resumed is not None:
        return Tokenizer.load(resumed.folder)
    return start[1] if start is not None else None


def samples_per_epoch(config: RunConfig, data: Prepared | StreamedText) -> int | None:
    """Samples in an epoch, where documents decide it; None: where the length of the text does.

    Raises:
        DataError: there is no text, or it is damaged.
    """
    if config.data.packing == "contiguous" or isinstance(data, StreamedText):
        return None
    seq_len = config.seq_len or config.model.max_seq_len
    return Documents(data.train, seq_len, config.seed, data.tokenizer.end_of_text).per_epoch


def check(config: ResolvedConfig, data: Prepared | StreamedText) -> None:
    """Refuse what only the text and the tokenizer can tell.

    Raises:
        ConfigError: the model knows fewer tokens than the tokenizer. DataError: too little text, or a prompt it cannot spell.
    """
    if (config.model.vocab_size or 0) < data.tokenizer.vocab_size:
        cause = f"{config.model.vocab_size} tokens, but the tokenizer has {data.tokenizer.vocab_size}"
        raise ConfigError(
            "vocabulary too small", where="model.vocab_size", cause=cause, fix="leave it out: the tokenizer decides"
        )
    if isinstance(data, Prepared) and config.data.packing == "contiguous":
        check_length(data.train, config.seq_len, "training")
    if len(data.validation) < 2:
        raise DataError(
            "too little text",
            where="data",
            cause="nothing is left to validate on",
            fix="give more text, or data.validation",
        )
    check_prompt(len(data.tokenizer.encode(config.sample_prompt)), config.model, "sample_prompt")
