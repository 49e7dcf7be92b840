"""nanoGPT's checkpoints as ours: the same logits, with the exact GELU, and nothing opened that the user did not allow."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.errors import CheckpointError, UntrustedFileError
from gpt2lab.weights import sandbox, unpickle
from gpt2lab.weights.layout import Imported
from gpt2lab.weights.nanogpt import read, recognises
from tests.reference import assert_differ, assert_same

ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "bias": True, "vocab_size": 300, "dropout": 0.0}


class LayerNorm(nn.Module):
    """A layer norm whose bias may be missing, with nanoGPT's names, as all below."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (y.view(batch, time, self.heads, width // self.heads).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(~torch.ones(time, time).tril().bool(), float("-inf"))
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)
        self.tanh = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.tanh:
            return self.c_proj(F.gelu(x, approximate="tanh"))
        return self.c_proj(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(width, bias), LayerNorm(width, bias)
        self.attn, self.mlp = Attention(width, heads, bias), MLP(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The model that nanoGPT's checkpoints are of, written from what its paper and its file say."""

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        width, bias = args["n_embd"], args["bias"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], width),
                "wpe": nn.Embedding(args["block_size"], width),
                "h": nn.ModuleList(Block(width, args["n_head"], bias) for _ in range(args["n_layer"])),
                "ln_f": LayerNorm(width, bias),
            }
        )
        self.lm_head = nn.Linear(width, args["vocab_size"], bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for parameter in self.parameters():  # so large that every part shows in the logits
            nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            self.transformer["ln_f"].weight.mul_(5)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.transformer["wte"](token_ids) + self.transformer["wpe"].weight[: token_ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def save(folder: Path, **changes: Any) -> tuple[Path, NanoGPT]:
    """A checkpoint as nanoGPT's train.py writes it after a step; `changes` are to its model_args."""
    args = ARGS | changes
    model = NanoGPT(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.lm_head.weight.square().sum().backward()
    optimizer.step()
    config = {"out_dir": "out", "learning_rate": 6e-4, "compile": True, "always_save_checkpoint": True}
    checkpoint = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": args,
        "iter_num": 1, "best_val_loss": torch.tensor(9.9), "config": config,
    }  # fmt: skip
    torch.save(checkpoint, folder / "ckpt.pt")
    return folder / "ckpt.pt", model


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files that are ours: what the child process does, without the second that starting one takes."""

    def extract(path: Path, real: Path, folder: Path, only: tuple[str, ...]) -> None:
        unpickle.extract(real, folder, list(only))

    monkeypatch.setattr(sandbox, "_run_child", extract)


def change(path: Path, **parts: Any) -> None:
    """Replace parts of a checkpoint of our own."""
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | parts, path)


def weights(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=True)["model"])


def token_ids(vocab_size: int = 257) -> Tensor:
    return torch.arange(80).view(2, 40) * 97 % vocab_size


@torch.inference_mode()
def logits(imported: Imported) -> Tensor:
    return imported.model(token_ids(imported.model.vocab_size))


# --- The same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_logits_are_theirs(bias: bool, tmp_path: Path) -> None:
    path, theirs = save(tmp_path, bias=bias)
    assert recognises(path)
    imported = read(path, "bytes", allow_pickle=True)
    assert not imported.model.training and imported.model.config.bias is bias
    assert imported.model.config.activation == "gelu" and imported.tokenizer.vocab_size == 257
    expected = theirs(token_ids(300))
    assert_same(logits(imported), expected, within=1e-4)
    for block in theirs.transformer["h"]:
        block.mlp.tanh = True
    assert_differ(theirs(token_ids(300)), expected, by=2e-3, what="the tanh form of GELU")


def test_every_tensor_is_accounted_for_and_the_optimizer_left_behind(in_this_process: None, tmp_path: Path) -> None:
    path, theirs = save(tmp_path)
    found = read(path, "bytes", allow_pickle=True).map
    assert sorted(found.loaded) == sorted(set(theirs.state_dict()) - {"lm_head.weight"})
    assert found.left_over == ["lm_head.weight (tied to the token embedding)"]
    assert not (found.transposed or found.cut or found.missing)


def test_a_compiled_model_and_old_masks(in_this_process: None, tmp_path: Path) -> None:
    path, theirs = save(tmp_path)
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 48, 48).tril() for layer in (0, 1)}
    change(path, model={f"_orig_mod.{name}": tensor for name, tensor in (weights(path) | masks).items()})
    imported = read(path, "bytes", allow_pickle=True)
    assert_same(logits(imported), theirs(token_ids(300)), within=1e-4)
    assert sorted(imported.map.left_over) == [
        "_orig_mod.lm_head.weight (tied to the token embedding)",
        "_orig_mod.transformer.h.0.attn.bias (the causal mask)",
        "_orig_mod.transformer.h.1.attn.bias (the causal mask)",
    ]


def test_rows_that_pad_gpt2_s_vocabulary_are_cut(
    data_folder: Path, in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2LAB_DATA", str(data_folder))
    path, theirs = save(tmp_path, vocab_size=50304, n_embd=8, n_head=2, n_layer=1)
    imported = read(path, allow_pickle=True)
    assert imported.model.vocab_size == 50257 == imported.tokenizer.vocab_size
    assert imported.tokenizer.encode("First Citizen:").tolist() == [5962, 22307, 25]
    assert_same(logits(imported), theirs(token_ids(50257))[..., :50257], within=1e-4)
    assert imported.map.cut == ["transformer.wte.weight (47 rows that pad the vocabulary)"]


# --- What is refused --------------------------------------------------------------------------------------------------


def test_it_is_not_opened_unless_the_user_says_so(tmp_path: Path) -> None:
    path, _ = save(tmp_path)
    with pytest.raises(UntrustedFileError, match=r"can run code when it is opened.*--allow-pickle") as refused:
        read(path, "bytes")
    assert refused.value.exit_code == 8


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    path, _ = save(tmp_path)
    for name in ("ckpt.pth", "last.ckpt", "weights.bin"):
        (tmp_path / name).write_bytes(path.read_bytes())
        assert recognises(tmp_path / name)
    (tmp_path / "ckpt.txt").write_bytes(path.read_bytes())
    (tmp_path / "model.bin").write_bytes((20240326).to_bytes(4, "little") + bytes(1020))  # llm.c's
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    for name in ("ckpt.txt", "model.bin", "empty.pt", "folder.pt", "absent.pt"):
        assert not recognises(tmp_path / name), name


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model_args": ARGS | {"n_layer": 10**9}}, "model_args.n_layer: Input should be less than or equal to 1024"),
        ({"model_args": ARGS | {"n_head": 5}}, "num_heads 5 does not divide embed_dim 32"),
        ({"model_args": ARGS | {"n_embd": True}}, "model_args.n_embd: Input should be a valid integer, not True"),
        ({"model_args": ARGS | {"bias": 1}}, "model_args.bias: Input should be a valid boolean, not 1"),
        ({"model_args": ARGS | {"rotary": True}}, "model_args.rotary: Extra inputs are not permitted"),
        ({"model_args": {}}, "model_args.n_layer: Field required"),
        ({"model_args": None}, "it has no model_args, as nanoGPT writes them"),
        ({"model_args": ARGS | {"n_embd": 2**20, "n_head": 1}}, r"wte\.weight is \(300, 32\), not \(300, 1048576\)"),
        ({"model_args": ARGS | {"bias": False}}, "transformer.h.0.ln_1.bias is no part of the model that model_args describe"),
        ({"model_args": ARGS | {"n_layer": 1}}, "transformer.h.1.ln_1.weight is no part of the model"),
        ({"model_args": ARGS | {"n_layer": 3}}, r"missing transformer\.h\.2\.ln_1\.weight"),
        ({"model_args": ARGS | {"block_size": 49}}, r"transformer\.wpe\.weight is \(48, 32\), not \(49, 32\)"),
        ({"model_args": ARGS | {"vocab_size": 290}}, r"transformer\.wte\.weight is \(300, 32\), not \(290, 32\)"),
        ({"model": {}}, r"missing transformer\.wte\.weight"),
        ({"model": [1]}, r"missing transformer\.wte\.weight"),
    ],
)  # fmt: skip
def test_a_shape_that_is_not_that_of_the_weights_is_refused(
    parts: dict[str, Any], says: str, in_this_process: None, tmp_path: Path
) -> None:
    path, _ = save(tmp_path)
    change(path, **parts)
    with pytest.raises(CheckpointError, match=says):
        read(path, "bytes", allow_pickle=True)


def test_weights_that_are_not_finite_are_refused(in_this_process: None, tmp_path: Path) -> None:
    path, _ = save(tmp_path)
    held = weights(path)
    held["transformer.ln_f.bias"][3] = float("nan")
    change(path, model=held)
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.bias has numbers that are not finite"):
        read(path, "bytes", allow_pickle=True)


def test_a_head_of_its_own_is_refused(in_this_process: None, tmp_path: Path) -> None:
    path, _ = save(tmp_path)
    held = weights(path)
    change(path, model=held | {"lm_head.weight": held["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the token embedding"):
        read(path, "bytes", allow_pickle=True)


def test_a_vocabulary_that_nothing_explains_is_refused(in_this_process: None, tmp_path: Path) -> None:
    path, _ = save(tmp_path)
    with pytest.raises(CheckpointError, match="nothing beside it says what its 300 tokens are"):
        read(path, allow_pickle=True)


def test_a_class_in_the_part_that_is_not_wanted_is_refused(tmp_path: Path) -> None:
    path, _ = save(tmp_path)
    change(path, config=Path("x"))
    with pytest.raises(UntrustedFileError, match=r"it contains pickled code: pathlib\.PosixPath"):
        read(path, "bytes", allow_pickle=True)
