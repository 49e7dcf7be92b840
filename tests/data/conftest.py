"""Each test here has an empty folder to stand in, a cache of its own, and no network."""

import urllib.request
from pathlib import Path
from typing import NoReturn

import pytest


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> NoReturn:
        raise OSError("the cable is cut")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("GPT2LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT2LAB_DATA", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
