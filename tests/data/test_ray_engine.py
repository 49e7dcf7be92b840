"""The shards that a real Ray cluster of two cores writes, also when its processes are killed, against those of one process."""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpt2lab.config import DataConfig, to_dict
from gpt2lab.data import ray_engine, survey
from gpt2lab.data.prepare import prepare
from gpt2lab.data.text import read_text
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.tokenizer import Tokenizer
from tests.test_train import tree

SHARD_CHARS = 50_000
SMALL_SHARDS = f"""
import os, sys
if any(word.endswith(("gpt2lab", "default_worker.py")) for word in sys.orig_argv):  # and not Ray's own processes
    from gpt2lab.data import ray_engine, survey
    survey.SHARD_CHARS = {SHARD_CHARS}
    ray_engine.RETRIES = int(os.environ.get("TEST_RETRIES", ray_engine.RETRIES))
"""
"""What every Python of these tests begins with: the package's shards are of a size that no test can fill."""
CLUSTER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@dataclass
class Place:
    """A folder with a text, what becomes of it in one process, and how to get there with Ray."""

    folder: Path
    environment: dict[str, str]
    whole: dict[str, bytes]

    @contextmanager
    def start(self, out: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """`gpt2lab data prepare`; at the end of the ``with`` it is over."""
        words = ["data", "prepare", "source", "--tokenizer", "tokenizer", "--out", out, "--engine", "ray"]
        command, environment = [sys.executable, "-m", "gpt2lab", *words], self.environment | environment
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.terminate()  # where a test failed: Ray's handler ends what belongs to it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Twenty documents of words that no table knows: they take the time in which something can be killed."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "source").mkdir()
    letters = np.random.default_rng(1).choice(
        np.frombuffer(b"abcdefghijklmnopqrstuvw    \n", np.uint8), (20, SHARD_CHARS)
    )
    for number, text in enumerate(letters):
        (folder / "source" / f"{number:02}.txt").write_bytes(text.tobytes())
    (folder / "tokenizer").mkdir()
    Tokenizer.train_bpe([letters[0].tobytes().decode()], 300).save(folder / "tokenizer")
    (folder / "sitecustomize.py").write_text(SMALL_SHARDS)
    paths = [str(folder), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "GPT2LAB_CACHE": str(folder / "cache")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # for clusters of these tests
    environment.pop("RAY_ADDRESS", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "SHARD_CHARS", SHARD_CHARS)
        patch.setenv("GPT2LAB_CACHE", str(folder / "cache"))
        config = DataConfig(source=str(folder / "source"))
        whole = tree(prepare(config, str(folder / "tokenizer"), folder=folder / "whole").folder)
    assert len(whole) > 15
    return Place(folder, environment, whole)


@dataclass
class Cluster:
    """One that is there before us and after us."""

    address: str
    process: psutil.Process

    def at_work(self) -> list[psutil.Process]:
        """Its processes that carry out a task of ours: Ray calls them so."""
        below = self.process.children(recursive=True)
        return [worker for worker in below if "".join(worker.cmdline()).startswith("ray::write_some")]


@pytest.fixture(scope="module")
def cluster(place: Place) -> Iterator[Cluster]:
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(
        command, env=place.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdin and driver.stdout and driver.stderr
        address, process = driver.stdout.readline().strip(), psutil.Process(driver.pid)
        assert address, driver.stderr.read()
        yield Cluster(address, process)
        known = process.children(recursive=True)
        driver.stdin.close()
        driver.wait(60)
        _gone(known)


def _gone(processes: list[psutil.Process]) -> None:
    """Wait until none of them is left; where one is, kill them and fail."""
    _, left = psutil.wait_procs(processes, timeout=30)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not left


def kill(cluster: Cluster, aside: Path) -> int:
    """Kill whoever is at work; how many shards are whole."""
    workers = cluster.at_work()
    for worker in workers:
        worker.kill()
    written = len(list(aside.glob("*.bin")))
    assert workers and written, "it was over before it was killed"
    return written


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_its_tasks_write_the_same_shards(place: Place, cluster: Cluster) -> None:
    with place.start("same", RAY_ADDRESS=cluster.address) as process:
        said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert tree(place.folder / "same") == place.whole
    assert "of 20 shards written" in complaints and said.startswith("train ")


def test_a_worker_that_is_killed_is_started_again(place: Place, cluster: Cluster) -> None:
    aside = place.folder / "killed.part"
    with place.start("killed", RAY_ADDRESS=cluster.address) as process:
        wait_until(lambda: list(aside.glob("train-*.bin")) and cluster.at_work(), process)
        written = kill(cluster, aside)
        _, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert tree(place.folder / "killed") == place.whole
    assert 0 < written < 20


def test_a_worker_that_is_killed_again_and_again_ends_it_in_one_line(place: Place, cluster: Cluster) -> None:
    aside = place.folder / "often.part"
    with place.start("often", RAY_ADDRESS=cluster.address, TEST_RETRIES="0") as process:
        wait_until(lambda: list(aside.glob("train-*.bin")) and cluster.at_work(), process)
        kill(cluster, aside)
        _, complaints = process.communicate()
    *_, last = complaints.splitlines()
    assert process.returncode == 6 and last.startswith(
        "gpt2lab: text not tokenised (--engine ray): Ray tried it 1 times"
    )


def test_a_cluster_of_its_own_ends_with_control_c(place: Place) -> None:
    aside = place.folder / "stopped.part"
    with place.start("stopped") as process:
        wait_until(lambda: list(aside.glob("train-*.bin")), process)
        known = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints.splitlines()[-1]) == (130, "stopped"), complaints
    assert len(known) > 3
    _gone(known)
    assert not (place.folder / "stopped").exists()


def test_an_address_without_a_cluster_is_refused_at_once(place: Place) -> None:
    with place.start("nowhere", RAY_ADDRESS="127.0.0.1:1") as process:
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 2 and complaints.startswith("gpt2lab: no cluster of Ray (127.0.0.1:1): ")
    assert complaints.count("\n") == 1


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.txt").write_text("text\n" * 9)
    text = read_text(config := DataConfig(source=str(tmp_path / "a.txt")))
    with pytest.raises(ConfigError, match=r"it is not installed\. Fix: pip install 'gpt2lab\[ray\]'"):
        ray_engine.write_shards(config, text, ["train-00000"], Tokenizer.bytes(), tmp_path, None, print)
    with pytest.raises(ConfigError, match="not for standard input"):
        ray_engine.write_shards(DataConfig(source="-"), text, [], Tokenizer.bytes(), tmp_path, None, print)


def test_what_a_task_cannot_do_it_tells(tmp_path: Path) -> None:
    """The task itself, in this process."""
    (tmp_path / "a.txt").write_text("text\n" * 9)
    Tokenizer.chars(["tex"]).save(tmp_path)  # it does not know the line break
    config = DataConfig(source="a.txt")
    here = os.getcwd()
    os.chdir(tmp_path)
    right = read_text(config).found.fingerprint
    os.chdir(here)

    def told(fingerprint: str = right, place: Path = tmp_path, folder: Path = tmp_path) -> str:
        return ray_engine.write_some("train-00000", json.dumps(to_dict(config)), fingerprint, str(place), str(folder))

    for problem, words in (
        (told(fingerprint="0" * 64), "texts differ"),
        (told(folder=tmp_path / "none"), "no shared folder"),
        (told(place=tmp_path / "none"), "no shared folder"),
        (told(), "unknown character"),
    ):
        error = ray_engine._unpack(problem)
        assert isinstance(error, DataError) and error.what == words
    Tokenizer.chars(["text\n"]).save(tmp_path)
    assert told() == "" and (tmp_path / "train-00000.bin").exists()
