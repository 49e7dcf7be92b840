"""Every problem a user can meet: one line, the values, the fix, and the exit code that other programs rely on."""

from __future__ import annotations

import errno


class LabError(Exception):
    """A problem worded for the person who meets it: ``<what> (<where>): <cause>. Fix: <fix>``.

    Attributes:
        exit_code: what the command line ends with when this reaches it.
    """

    exit_code = 70

    def __init__(self, what: str, *, where: str = "", cause: str, fix: str) -> None:
        place = f" ({where})" if where else ""
        cause, fix = (part if part.endswith("...") else part.removesuffix(".") for part in (cause, fix))
        text = f"{what}{place}: {cause}. Fix: {fix}."
        super().__init__(" ".join(text.split()))  # one line, whatever a library put into its own words
        self.what, self.where, self.cause, self.fix = what, where, cause, fix


class ConfigError(LabError, ValueError):
    """A command, a flag, a recipe or a combination of settings that cannot work."""

    exit_code = 2


class DataError(LabError, ValueError):
    """Text or token shards that cannot be used as they are."""

    exit_code = 3


class CheckpointError(LabError, ValueError):
    """A checkpoint or weights that are missing, damaged, or not for this model."""

    exit_code = 4


class ResourceError(LabError, OSError):
    """The machine ran out of disk, memory or file handles."""

    exit_code = 5


class ProcessError(LabError):
    """A process that we started died or hung."""

    exit_code = 6


class SaidElsewhere(ProcessError):
    """The end of this process, after another one has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped", cause="another process failed, and has said why", fix="what it says")
        self.exit_code = exit_code


class NumbersError(LabError, ArithmeticError):
    """A loss or a gradient that is not finite."""

    exit_code = 7


class UntrustedFileError(LabError, ValueError):
    """A file that could run code when opened, from a source we did not just write."""

    exit_code = 8


class Interrupted(LabError):
    """A signal stopped the work; a valid checkpoint was written first."""

    exit_code = 75


_EXHAUSTED = {
    errno.ENOSPC: ("disk full", "free some space, then give the same command again: it goes on from what is saved"),
    errno.EDQUOT: ("disk quota reached", "free some space, then give the same command again"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n 4096), then give the same command again"),
    errno.ENFILE: ("too many open files on this machine", "close other programs, then give the same command again"),
    errno.EFBIG: (
        "file too large for this disk or limit",
        "raise the limit (ulimit -f), or use another disk with --out",
    ),
    errno.ENOMEM: ("out of memory", "lower micro_batch, then give the same command again"),
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a GPU had no memory left."""
    starved = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return starved or "can't allocate memory" in str(error)


def as_lab_error(error: BaseException) -> LabError | None:
    """Word what the machine says (a full disk, no memory, no permission) as one of ours.

    Returns None for anything else: that is a bug, and keeps its traceback for ``--debug``.
    """
    if isinstance(error, LabError):
        return error
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        what, fix = _EXHAUSTED[error.errno]
        return ResourceError(what, where=str(error.filename or ""), cause=error.strerror or str(error), fix=fix)
    # safetensors and tokenizers raise their own types, with the system's words inside.
    if "No space left on device" in str(error):
        what, fix = _EXHAUSTED[errno.ENOSPC]
        return ResourceError(what, cause=str(error), fix=fix)
    if is_out_of_memory(error):
        return ResourceError(
            "out of memory",
            cause=str(error).split("\n")[0] or "the system refused more",
            fix="lower micro_batch, seq_len or the model's size; `gpt2lab plan RECIPE` shows what each needs",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(
            "no permission",
            where=str(error.filename),
            cause=error.strerror or "",
            fix="choose a place you may write to, such as --out=runs/mine",
        )
    return None
