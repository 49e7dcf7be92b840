"""A quantised model as a folder: a quarter of the size, the same bits when it is opened, and nothing but reading."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2lab import checkpoint
from gpt2lab.config import RunConfig, to_dict, to_yaml
from gpt2lab.errors import CheckpointError, ConfigError
from gpt2lab.generation.prepare import for_reading
from gpt2lab.model import reading
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.quantized import has_int8
from gpt2lab.model.reading import Quantize, quantize_weights, whole
from gpt2lab.settle import settle
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import convert_model, export_model, open_model, quantize_model, save_model
from tests.model.test_variants import EXPERTS, PARTS, SHAPE, build, each, tokens

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this torch has no FBGEMM")
BYTES = {"vocab_size": 257}
SAVED = {
    "gpt2": SHAPE | BYTES,
    "untied": SHAPE | BYTES | PARTS["untied"],
    "experts": SHAPE | BYTES | EXPERTS,
    "modern": SHAPE | BYTES | PARTS["modern"],
}
FIX = r"Fix: name the model it was made from\.$"


def saved(folder: Path, variant: dict[str, Any]) -> tuple[GPT2, str]:
    """A model, and where it lies."""
    model = build(variant).eval()
    save_model(folder / "whole", model, Tokenizer.bytes())
    return model, str(folder / "whole")


@needs_int8
@pytest.mark.parametrize("to", ["int8", "int4"])
@each(SAVED)
@torch.inference_mode()
def test_what_is_opened_computes_the_same_bits(variant: dict[str, Any], to: Quantize, tmp_path: Path) -> None:
    model, name = saved(tmp_path, variant)
    difference = quantize_model(name, tmp_path / "small", to)
    opened, tokenizer = open_model(str(tmp_path / "small"))
    token_ids = tokens(2, 20, vocab_size=257)
    logits = opened(token_ids)
    assert torch.equal(logits, for_reading(model, to)(token_ids)) and tokenizer.vocab_size == 257
    assert not torch.equal(logits, model(token_ids))
    assert 0 < difference < float(model(token_ids).max() - model(token_ids).min())
    assert opened.config == model.config and not opened.training
    found = checkpoint.load(tmp_path / "small")
    assert found.recipe["quantize"].value == to and {w.dtype for w in found.weights().values()} >= {torch.int8}


@pytest.mark.parametrize(("to", "parts"), [("int8", 3.6), ("int4", 4.5)])
def test_it_is_a_quarter_of_the_size(to: Quantize, parts: float, tmp_path: Path) -> None:
    save_model(tmp_path / "whole", GPT2(257, 64, 128, 2, 512, 2), Tokenizer.bytes())
    quantize_model(str(tmp_path / "whole"), tmp_path / "small", to)
    before, after = ((tmp_path / name / checkpoint.MODEL).stat().st_size for name in ("whole", "small"))
    assert before > parts * after


@needs_int8
def test_nothing_but_reading(tmp_path: Path) -> None:
    _, name = saved(tmp_path, SAVED["gpt2"])
    quantize_model(name, tmp_path / "small")
    small, out = str(tmp_path / "small"), tmp_path / "out"
    with pytest.raises(ConfigError, match=rf"^not a whole model \(.*small\): its weights are quantised.*{FIX}"):
        export_model(small, out)
    with pytest.raises(ConfigError, match=FIX):
        export_model(small, out, "gguf")
    with pytest.raises(ConfigError, match=FIX):
        convert_model(small, out, {"num_kv_heads": 1})
    with pytest.raises(ConfigError, match=FIX):
        quantize_model(small, out)
    with pytest.raises(ConfigError, match=FIX):
        settle(RunConfig(init_from=small, steps=1))
    with pytest.raises(ConfigError, match="cannot save"):
        save_model(out, open_model(small)[0], Tokenizer.bytes())
    assert not out.exists()
    with pytest.raises(ConfigError, match="will not overwrite"):
        quantize_model(name, tmp_path / "small")
    convert_model(name, out, {"num_kv_heads": 1})  # the fix


def test_a_folder_whose_scales_are_not_its_own_is_refused(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, SAVED["gpt2"])
    weights = quantize_weights(model.state_dict(), "int8")
    name = "blocks.0.mlp.up_proj.weight_scale"
    faults: dict[str, dict[str, torch.Tensor]] = {
        f"missing {name}": {key: tensor for key, tensor in weights.items() if key != name},
        f"{name} is (7,), not (48,)": weights | {name: torch.ones(7)},
        "left over more": weights | {"more": torch.ones(1)},
    }
    for number, (fault, tensors) in enumerate(faults.items()):
        folder, recipe = tmp_path / str(number), to_yaml({"quantize": "int8", "model": to_dict(model.config)})
        checkpoint.save(folder, tensors, recipe=recipe, tokenizer=Tokenizer.bytes())
        with pytest.raises(CheckpointError) as caught:
            open_model(str(folder))
        assert fault in str(caught.value) and "weights do not fit the model" in str(caught.value)


@pytest.mark.parametrize("to", ["int8", "int4"])
@torch.inference_mode()
def test_where_there_is_no_kernel_the_same_weights_are_read_whole(
    to: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = saved(tmp_path, SAVED["gpt2"])
    weights = whole(quantize_weights(model.state_dict(), to))
    rounded = GPT2.from_config(model.config).eval()
    rounded.load_state_dict(weights)
    monkeypatch.setattr(reading, "has_int8", lambda: False)
    monkeypatch.setattr(reading.native, "library", lambda: None)
    quantize_model(name, tmp_path / "small", to)
    token_ids = tokens(2, 20, vocab_size=257)
    logits = open_model(str(tmp_path / "small"))[0](token_ids)
    assert torch.allclose(logits, rounded(token_ids), atol=1e-4)
    assert not torch.allclose(logits, model(token_ids), atol=1e-2)
