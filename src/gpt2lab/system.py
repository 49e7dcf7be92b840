"""Where a run runs: the device, the precision of its products, its memory, and the signals that ask it to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from gpt2lab.config import GPT2Config, Precision, SystemConfig
from gpt2lab.errors import ConfigError

BF16_MUST_WIN_BY = 1.2
"""auto takes the coarser numbers only where they are clearly faster."""


def choose_device(name: str, flag: str = "system.device") -> torch.device:
    """The device that a recipe or a `flag` names; auto: cuda, then mps, then cpu.

    Raises:
        ConfigError: it is not on this machine.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name]:
        cause = f"torch finds no {name} device on this machine"
        raise ConfigError("no such device", where=flag, cause=cause, fix=f"--{flag}=auto")
    return torch.device(name)


def choose_precision(
    config: SystemConfig, model: GPT2Config, tokens: int, device: torch.device
) -> tuple[Precision, str]:
    """The precision of matrix products and why: what the recipe says, or the fastest measured at this model's shapes.

    Args:
        tokens: in one forward pass.

    Raises:
        ConfigError: fp16 on a CPU, or bf16 on a GPU that has none.
    """
    if config.precision == "fp16" and device.type == "cpu":
        cause = "gradients in fp16 need a scaler that only GPUs have"
        raise ConfigError("no fp16 here", where="system.precision", cause=cause, fix="--system.precision=auto")
    if config.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        cause = f"{torch.cuda.get_device_name()} has no bf16"
        raise ConfigError("no bf16 here", where="system.precision", cause=cause, fix="--system.precision=fp16")
    if config.precision != "auto":
        return config.precision, "as given"
    fp32, bf16 = (product_rate(kind, model, tokens, device) for kind in ("fp32", "bf16"))
    reason = f"a layer's product runs at {bf16 / 1e9:,.0f} GFLOP/s in bf16 and {fp32 / 1e9:,.0f} in fp32 here"
    return ("bf16" if bf16 > BF16_MUST_WIN_BY * fp32 else "fp32"), reason


def product_rate(precision: str, model: GPT2Config, tokens: int, device: torch.device) -> float:
    """FLOP/s of the MLP's first layer; in 16 bits its weight is cast from fp32 each time, as in training. The best of many."""
    rows, width, hidden = min(tokens, 4096), model.embed_dim, model.hidden_dim
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    x, weight = torch.randn(rows, width, device=device), torch.randn(hidden, width, device=device)
    best, deadline = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        F.linear(x.to(dtype), weight.to(dtype))
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * rows * width * hidden / best


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """Accelerate, told the device and the precision. Batches, seeds and checkpoints stay ours."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    mixed = precision if precision in ("bf16", "fp16") else "no"
    os.environ.pop(
        "ACCELERATE_USE_FSDP", None
    )  # of `accelerate launch --use_fsdp`: the strategy, which is ours to apply
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # else a second run in one process keeps the first's precision
    # The gradients of replicas lie in what is sent, and are not kept twice.
    replicas = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[replicas])


def run_in(config: SystemConfig, device: torch.device, local_size: int) -> None:
    """Set what torch has only once for a whole process: threads, and kernels that give the same bits each time.

    Args:
        local_size: processes on this machine, which share its cores.
    """
    if device.type == "cpu":
        keep_freed_memory()
        if config.exact:
            torch.set_num_threads(1)
        elif local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_of_each(local_size))
        if local_size > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else Accelerate chooses, later
    torch.use_deterministic_algorithms(config.exact, warn_only=True)
    if config.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may add in another order


def threads_of_each(processes: int) -> int:
    """The threads of each of several processes that share the cores this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks that are freed: a step asks for the same ones again, and fresh pages are slow.

    1.3 to 1.5 times faster steps of small models on two cores (docs/LOG.md). Does nothing where there is no glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mmap_max, trim_threshold = -4, -1  # from malloc.h
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, 2**31 - 1)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on a GPU what torch allocated there, else resident memory, libraries too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory_bytes(device: torch.device) -> int:
    """Memory that could be had now: of a GPU, or of the machine, within what a container and ``ulimit -v`` allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, group = [psutil.virtual_memory().available], Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such files elsewhere than on Linux, and "max" without a limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    with suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def reachable_memory_bytes(device: torch.device) -> int:
    """Memory that this process has, or could have."""
    cuda = device.type == "cuda"
    return available_memory_bytes(device) + (
        torch.cuda.memory_reserved(device) if cuda else psutil.Process().memory_info().rss
    )


def describe_machine(device: torch.device) -> str:
    """The device, its cores and the versions, in one line."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{kind}, Python {sys.version.split()[0]}, torch {torch.__version__}"


class StopSignals:
    """SIGTERM, SIGINT or SIGHUP asks for a stop between two steps; a second one ends the process at once.

    Attributes:
        received: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
            self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def ask(self, why: str) -> None:
        """Ask for a stop as a signal would."""
        self.received = self.received or why

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for kind in self._before:
            signal.signal(kind, signal.SIG_DFL)

    def __exit__(self, *exc: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
