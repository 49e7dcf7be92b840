"""The library of loops in C++, compiled once for this machine; where that cannot be, torch's own kernels serve.

A step of decoding is hundreds of small operations around its matrices, and on a CPU they cost as much as could be saved on the
matrices themselves. A compiler takes seconds for `loops/`, and what it made is kept in the cache folder. It is asked for on
Linux and x86 alone; ``CXX`` and ``CXXFLAGS`` mean what they always do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.paths import cache_folder

SOURCES = Path(__file__).with_name("loops")
COMPILERS = ("g++", "c++")
"""GCC's, whose OpenMP is torch's: with two of them, the threads of each would be in the other's way."""
MACHINE, SHARED = ("-march=native", "-fopenmp"), ("-shared", "-fPIC")
FLAGS = ("-std=c++20", "-O3", *MACHINE, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", *SHARED)
"""Not -ffast-math: it would let NaN pass, and change how the whole process rounds. Nor may products and sums be joined where
the compiler likes: a row's bits would depend on how many there are."""
POINTER, NUMBER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SECONDS = 120
"""How long a compiler may take; it takes about five."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where there is no compiler, or the environment says ``GPT2LAB_NATIVE=0``, or, with a warning,
    where it fails."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    here = platform.system(), platform.machine()
    if compiler is None or here != ("Linux", "x86_64") or os.environ.get("GPT2LAB_NATIVE") == "0":
        return None
    try:
        # torch is there first: its OpenMP serves the loops too, with as many threads as torch was told to take.
        loops = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        says = getattr(error, "stderr", None) or str(error).encode()
        cause = says.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        warnings.warn(f"no compiled step, so writing is slower: {compiler}: {cause[0]}", stacklevel=2)
        return None
    loops.run_layers.argtypes = [POINTER, NUMBER, POINTER, NUMBER, NUMBER, POINTER, NUMBER, POINTER, POINTER, POINTER]
    loops.project.argtypes = [POINTER, POINTER, POINTER, POINTER, NUMBER]
    loops.project_largest.argtypes = [*[POINTER] * 7, NUMBER, NUMBER]
    loops.run_layers.restype = loops.project.restype = loops.project_largest.restype = None
    return loops


def _compiled(compiler: str) -> Path:
    """The library, made now or before: for this processor, by this compiler, from this source."""
    words = [*shlex.split(compiler), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    says = [*words, "-E", "-v", "-x", "c++", os.devnull]  # its version, and what "native" is
    told = subprocess.run(says, capture_output=True, check=True, timeout=SECONDS).stderr
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    name = hashlib.sha256(sources + told).hexdigest()[:32]
    made = cache_folder() / "native" / f"{name}.so"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as place:
            aside = Path(place) / made.name
            words += [str(SOURCES / "step.cpp"), "-o", str(aside)]
            subprocess.run(words, capture_output=True, check=True, timeout=SECONDS)
            aside.replace(made)  # at once: another process may look for it
    return made


def pointer(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor's numbers are; None of none."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


def in_blocks(weight: Int[Tensor, "out in"]) -> Int[Tensor, "block quad output 4"]:
    """Weights in eight bits as the loops read them (`eight.h`): of 16 outputs four inputs each, then the next four."""
    (out_features, in_features), (outputs, inputs) = weight.shape, (16, 64)
    padded = nn.functional.pad(weight, (0, -in_features % inputs, 0, -out_features % outputs))
    return padded.view(-1, outputs, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()


class Linear(ctypes.Structure):
    """A linear layer: its weights, and for eight bits their scales and sums; the tensors must be kept elsewhere."""

    _fields_ = (
        *((name, POINTER) for name in ("weight", "scale", "sums", "bias")),
        *((name, NUMBER) for name in ("in_features", "out_features")),
    )

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> Linear:
        """``x @ weight.T + bias``."""
        assert weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
        return cls(pointer(weight), None, None, pointer(bias), weight.shape[1], weight.shape[0])

    @classmethod
    def of_eight(
        cls,
        blocks: Int[Tensor, "block quad output 4"],
        scale: Float[Tensor, " out"],
        sums: Float[Tensor, " out"],
        bias: Float[Tensor, " out"] | None,
        in_features: int,
    ) -> Linear:
        """The same with weights `in_blocks`, the size of their steps, and their sums over the inputs."""
        assert blocks.dtype == torch.int8
        assert all(x is None or x.dtype == torch.float32 for x in (scale, sums, bias))
        return cls(*map(pointer, (blocks, scale, sums, bias)), in_features, len(scale))


class Norm(ctypes.Structure):
    """A LayerNorm, or an RMSNorm where it is not centred."""

    _fields_ = (("weight", POINTER), ("bias", POINTER), ("centred", NUMBER), ("eps", FLOAT))


class Layer(ctypes.Structure):
    """A block."""

    _fields_ = (
        *(("attn_norm", Norm), ("qkv", Linear), ("output", Linear), ("mlp_norm", Norm)),
        *((name, ctypes.POINTER(Linear)) for name in ("router", "up", "down")),
        *((name, NUMBER) for name in ("num_experts", "experts_per_token", "heads", "kv_heads", "dim", "window")),
        *(("activation", NUMBER), ("qk_norm", NUMBER), ("qk_eps", FLOAT)),
    )


def project(norm: Norm | None, layer: Linear, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    """A linear layer, with a norm before it or none."""
    loops, x = library(), x.contiguous()
    assert loops is not None and x.dtype == torch.float32
    y = x.new_empty(*x.shape[:-1], layer.out_features)
    loops.project(None if norm is None else ctypes.byref(norm), ctypes.byref(layer), pointer(x), pointer(y), _rows(x))
    return y


def project_largest(
    norm: Norm, layer: Linear, rough: Linear, changed: Tensor, sizes: Tensor, x: Float[Tensor, "row in"], most: int
) -> Float[Tensor, "row out"]:
    """The same of floats, where only the `most` largest of a row are asked for; others may be -inf.

    Args:
        rough: the layer in eight bits.
        changed: how far its rows of weights are from the true ones, and `sizes`: how long they are.
    """
    loops, x = library(), x.contiguous()
    assert loops is not None and x.dtype == torch.float32
    y = x.new_empty(len(x), layer.out_features)
    about = (*map(ctypes.byref, (norm, layer, rough)), pointer(changed), pointer(sizes))
    loops.project_largest(*about, pointer(x), pointer(y), len(x), most)
    return y


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
