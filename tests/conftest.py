"""For all tests: shapes are checked, hypothesis draws the same cases every time, runs have a place, data may be absent."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from torch import Tensor

ROOT = Path(__file__).parents[1]


AS_MYPY = beartype(conf=BeartypeConf(is_pep484_tower=True))  # 1 may stand where a float is meant


def says_a_shape(hint: Any) -> bool:
    """Whether a type hint is, or holds, a jaxtyping shape."""
    is_shape = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_shape or any(map(says_a_shape, get_args(hint)))


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the import hook puts around each function: beartype where a signature says a shape; the rest is mypy's work."""
    return AS_MYPY(function) if any(map(says_a_shape, function.__annotations__.values())) else function


assert "gpt2lab" not in sys.modules, "gpt2lab was imported before the hook that checks its shapes"
jaxtyping.install_import_hook("gpt2lab", "tests.conftest.check_shapes")

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell put all of this into the background
torch.set_num_threads(1)  # these models are too small to share out, and one thread sums in one order
settings.register_profile("lab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lab")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(1337)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """For torch.compile, which cannot read the code of the shape checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The window of every attention that went block by block since the test began."""
    from gpt2lab.model import attend

    windows: list[int] = []
    in_blocks = attend._attend_in_blocks

    def noted(q: Tensor, k: Tensor, v: Tensor, earlier: int, window: int, *others: Any) -> Tensor:
        windows.append(window)
        return in_blocks(q, k, v, earlier, window, *others)

    monkeypatch.setattr(attend, "_attend_in_blocks", noted)
    return windows


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `text.txt`, and a cache of the module's own; for a whole module: ``usefixtures("workplace")``."""
    from tests.test_train import sentences

    folder = tmp_path_factory.mktemp("workplace")
    (folder / "text.txt").write_text(sentences())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2LAB_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with `text.txt`, in which `run` will be."""
    (tmp_path / "text.txt").symlink_to(workplace / "text.txt")
    return tmp_path


@pytest.fixture(scope="module")
def short_samples() -> Iterator[None]:
    """Samples of five tokens: where the model lies in shards, each token is gathered for."""
    from gpt2lab import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAMPLE_TOKENS", 5)
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The texts that are too large for the repository: GPT2LAB_DATA, from the root of the repository."""
    folder = (ROOT / os.environ.get("GPT2LAB_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set GPT2LAB_DATA to where tinyshakespeare and gpt2-tokenizer are")
    return folder
