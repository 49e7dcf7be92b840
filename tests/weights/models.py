"""The models of these tests: ours and transformers', with weights so large that every part shows in the logits."""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from gpt2lab.generation import generate
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer

STORY = "The cat sat on the mat. The cat's hat is the cat's.\n\nThe end, isn't it?  Yes: 1, 22, 333!\n"
SHAPE = {"vocab_size": 300, "max_seq_len": 96, "embed_dim": 32, "num_heads": 4, "ff_hidden_dim": 48, "num_layers": 2}
THEIR_SHAPE = {"vocab_size": 280, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
ROPE = {"position": "rope"}


def loud(seed: int = 0, **changes: Any) -> GPT2:
    """A random model of ours."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT2(**SHAPE | changes, generator=generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        if model.position_embedding is not None:
            model.position_embedding.weight.mul_(5)  # or it says the same token again and again
    return model


def their_model(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A random model of theirs."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(HFConfig(**THEIR_SHAPE | changes, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.transformer.wpe.weight.mul_(5)  # or it says the same token again and again
    return model


@torch.inference_mode()
def logits(model: Any, token_ids: Tensor | None = None) -> Tensor:
    """Of a model of either kind; of tokens from all over the vocabulary of `THEIR_SHAPE`, if none are given."""
    out = model(torch.arange(60).view(2, 30) * 4 if token_ids is None else token_ids)
    return out if isinstance(out, Tensor) else out.logits


def assert_same_greedy_text(model: GPT2, tokenizer: Tokenizer, theirs: GPT2LMHeadModel) -> None:
    """Both go on with the same 32 tokens after each of three prompts, and with others after each."""
    continued = set()
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt in ("The cat", "Yes: 1", "\n"):
        (sample,) = generate(model, tokenizer, prompt, max_new_tokens=32, temperature=0)
        prompt_ids = torch.from_numpy(tokenizer.encode(prompt)).long()[None]
        generated = theirs.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), **settings)
        assert sample.token_ids == generated[0, prompt_ids.shape[1] :].tolist() and len(sample.token_ids) == 32
        continued.add(tuple(sample.token_ids))
    assert len(continued) == 3 and len({token for ids in continued for token in ids}) > 10
