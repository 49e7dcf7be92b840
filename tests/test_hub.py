"""The Hub, as a server on the loopback that fails in many ways. Whatever happens, no half file has a final name."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download

from gpt2lab.errors import CheckpointError, ConfigError, DataError, LabError, UntrustedFileError
from gpt2lab.hub import fetch
from tests.fakehub import NAME, FakeHub, Fault, child_environment, digest, is_lfs, serving

CONFIG, WEIGHTS, INDEX, VOCAB = "config.json", "model.safetensors", "model.safetensors.index.json", "vocab.json"
MODEL = {
    CONFIG: b'{"model_type": "gpt2"}', WEIGHTS: Random(0).randbytes(300_000), VOCAB: b'{"a": 0}', "merges.txt": b"",
    "tokenizer.json": b"{}", "generation_config.json": b"{ }",
}  # fmt: skip
ELSE = {"pytorch_model.bin": b"\x80\x04cos\nsystem\n", "modeling.py": b"import os", "README.md": b"# Hello"}
TOKENIZER = (VOCAB, "merges.txt")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that has the model, and its large files on another server; at the end, the cache is looked through."""
    with serving(monkeypatch, cache) as fake:
        fake.commit(MODEL | ELSE)
        yield fake
    assert not half_files(cache)


def bring(fake: FakeHub, *files: str, name: str = NAME) -> Path:
    """`fetch`, which does not wait but notes how long it would have."""
    return fetch(name, *files, sleep=fake.pauses.append)


def half_files(cache: Path) -> list[str]:
    """Files of a cache that have a final name, but not the content which that promises."""
    wrong = []
    for path in [path for path in cache.rglob("*") if not path.is_dir() and ".locks" not in path.parts]:
        if path.parent.name == "blobs" and path.suffix != ".incomplete":
            content = path.read_bytes()
            if path.name not in (digest(content, True), digest(content, False)):
                wrong.append(str(path))
        elif "snapshots" in path.parts and (
            path.suffix == ".part" or path.resolve().parent.name != "blobs" or not path.exists()
        ):
            wrong.append(str(path))
    return wrong


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_a_child(
    fake: FakeHub, home: Path, *names: str, first: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`fetch` in a process that knows the Hub by its environment alone; it prints the folder, or the line."""
    code = f"{first}\nimport sys\nfrom gpt2lab.errors import LabError\nfrom gpt2lab.hub import fetch\n"
    code += "try: print(fetch(*sys.argv[1:], sleep=lambda seconds: None))\n"
    code += "except LabError as error: print(error); sys.exit(error.exit_code)\n"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", code, *names]
    return subprocess.run(
        command, env=child_environment(fake, home) | environment, capture_output=True, text=True, timeout=60
    )


# --- When all is well -------------------------------------------------------------------------------------------------


def test_a_model_comes_whole_and_nothing_else_does(fake: FakeHub, cache: Path) -> None:
    folder = bring(fake)
    assert folder == cache / "models--me--model" / "snapshots" / fake.refs["main"]
    assert contents(folder) == MODEL and not fake.pauses
    assert digest(b"hello\n", lfs=False) == "ce013625030ba8dba906f756967f9e9ca394464a"  # by git itself
    assert sorted(fake.got()) == sorted(set(MODEL) - {"merges.txt"})  # an empty file need not be asked for
    assert [path for _, path, _ in fake.asked if "api" in path] == ["/api/models/me/model/revision/main"]
    assert fake.got()[0] == CONFIG and fake.got()[-1] == WEIGHTS


def test_a_tokenizer_alone(fake: FakeHub) -> None:
    assert contents(bring(fake, *TOKENIZER)) == {name: MODEL[name] for name in TOKENIZER}


def test_the_second_time_the_hub_is_asked_once(fake: FakeHub) -> None:
    folder = bring(fake)
    fake.asked.clear()
    assert bring(fake) == folder and [path for _, path, _ in fake.asked] == ["/api/models/me/model/revision/main"]


def test_gpt2_has_a_short_name(fake: FakeHub, cache: Path) -> None:
    assert bring(fake, name="gpt2").parts[-3] == "models--openai-community--gpt2"
    assert fake.asked[0][1] == "/api/models/openai-community/gpt2/revision/main"


@pytest.mark.parametrize(
    "name", ["", "model", "me/", "me/../x", "../me", "me/a@", "me/a@../../x", "me/a b", "me/a/b", "me/a@/x"]
)
def test_what_is_no_name_is_not_asked_for(name: str, fake: FakeHub) -> None:
    for files, exit_code in (((), 4), (TOKENIZER, 3)):
        with pytest.raises(LabError, match=r"no name on the Hub: .* is neither OWNER/NAME nor") as caught:
            bring(fake, *files, name=name)
        assert caught.value.exit_code == exit_code and not fake.asked


def test_only_what_is_not_there_is_missing(fake: FakeHub) -> None:
    fake.commit({CONFIG: b"{}", WEIGHTS: b"weights"})
    assert contents(bring(fake)) == {CONFIG: b"{}", WEIGHTS: b"weights"}
    with pytest.raises(DataError, match=r"incomplete \(me/model\): the repository has no vocab.json"):
        bring(fake, *TOKENIZER)
    fake.commit({WEIGHTS: b"weights"})
    with pytest.raises(CheckpointError, match=r"incomplete \(me/model\): the repository has no config.json"):
        bring(fake)


# --- Faults that pass -------------------------------------------------------------------------------------------------


def other(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def busy(status: int, retry_after: str = "") -> Fault:
    return {"status": status, "headers": {"Retry-After": retry_after} if retry_after else {}}


PASS: dict[str, tuple[str, list[Fault], list[float]]] = {
    "large file cut once": (WEIGHTS, [{"cut": 150_000}], [1]),
    "large file cut three times": (WEIGHTS, [{"cut": 70_000}] * 3, [1, 2, 4]),
    "large file cut at once": (WEIGHTS, [{"cut": 0}], [1]),
    "small file cut once": (CONFIG, [{"cut": 5}], [1]),
    "cut, and then no ranges": (WEIGHTS, [{"cut": 150_000}, {"no ranges": 1, "cut": 100_000}], [1, 2]),
    "cut, and wrong content, and cut": (WEIGHTS, [{"cut": 150_000, "content": other}, {}, {"cut": 9}], [1, 1]),
    "large file: other content once": (WEIGHTS, [{"content": other}], []),
    "small file: other content once": (CONFIG, [{"content": other}], []),
    "more than there is, once": (WEIGHTS, [{"content": lambda content: content + b"more"}], []),
    "less than there is, once": (WEIGHTS, [{"content": lambda content: content[:-1]}], [1]),
    "500 for a file": (CONFIG, [busy(500)], [1]),
    "500 for a large file": (WEIGHTS, [busy(500)], [1]),
    "500, 502 and 503 for the list": ("api", [busy(500), busy(502), busy(503)], [1, 2, 4]),
    "429 for the list": ("api", [busy(429, "7")], [7]),
    "429 for a file": (CONFIG, [busy(429, "7")], [7]),
    "429 until tomorrow": ("api", [busy(429, "86400")], [60]),
    "429 for all time": (WEIGHTS, [busy(429, "9" * 5000)], [60]),
    "429 until a date": ("api", [busy(429, "Wed, 21 Oct 2015 07:28:00 GMT")], [1]),
    "429 at once again": ("api", [busy(429, "0"), busy(429)], [1, 2]),
    "408": (CONFIG, [busy(408)], [1]),
    "no answer for the list": ("api", [{"drop": 1}], [1]),
    "no answer for a file": (WEIGHTS, [{"drop": 1}, {"drop": 1}], [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "faults", "pauses"), PASS.values(), ids=PASS)
def test_a_fault_that_passes_costs_a_pause(name: str, faults: list[Fault], pauses: list[float], fake: FakeHub) -> None:
    fake.faults[name] = list(faults)
    assert contents(bring(fake)) == MODEL
    asked = [path for _, path, _ in fake.asked if "/api/" in path] if name == "api" else fake.got()
    assert fake.pauses == pauses and fake.faults[name] == [] and len(asked) == len(faults) + (1 if name == "api" else 5)


def test_what_came_is_not_asked_for_again(fake: FakeHub) -> None:
    fake.faults[WEIGHTS] = [{"cut": 200_000}]
    bring(fake)
    first, second = (headers.get("range", "") for _, path, headers in fake.asked if "/cdn/" in path)
    assert first == "" and 100_000 < int(second.removeprefix("bytes=").removesuffix("-")) <= 200_000


def test_a_server_that_falls_silent_is_left(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    fake.faults[WEIGHTS] = [{"cut": 200_000, "stall": True}]
    assert contents(bring(fake)) == MODEL and fake.pauses[0] == 1


def test_what_an_earlier_program_left_is_no_obstacle(fake: FakeHub, cache: Path) -> None:
    blobs = cache / "models--me--model" / "blobs"
    blobs.mkdir(parents=True)
    for name, left in ((WEIGHTS, b"?" * 400_000), (CONFIG, other(MODEL[CONFIG])), (VOCAB, b"?")):
        (blobs / f"{digest(MODEL[name], is_lfs(name))}.incomplete").write_bytes(left)
    assert contents(bring(fake)) == MODEL and not fake.pauses and not list(blobs.glob("*.incomplete"))


def test_a_moved_repository_is_followed(fake: FakeHub) -> None:
    new = "/api/models/openai-community/gpt2/revision/main?blobs=True"
    fake.faults["api"] = [{"status": 307, "headers": {"Location": new}}]
    assert contents(bring(fake)) == MODEL and len(fake.asked) > 2


def test_the_token_is_for_the_hub_alone(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    bring(fake)
    seen = {path: headers.get("authorization") for _, path, headers in fake.asked}
    assert {token for path, token in seen.items() if "/cdn/" not in path} == {"Bearer hf_secret"}
    assert [token for path, token in seen.items() if "/cdn/" in path] == [None]


# --- Faults that stay -------------------------------------------------------------------------------------------------

HTML = b"<html>Please log in to the hotel's network</html>"


def listed(**entry: Any) -> Fault:
    """A list with weights and, in these words, a config."""
    weights = {"rfilename": WEIGHTS, "size": 1, "blobId": "0" * 40}
    return {"listing": {"siblings": [weights, {"rfilename": CONFIG} | entry]}}


STAY: dict[str, tuple[str, Fault, str, list[float]]] = {
    "nothing ever comes": (CONFIG, {"cut": 0}, r"no Hub answers at http://.* in 4 tries .*Fix: go online", [1, 2, 4]),
    "wrong content": (CONFIG, {"content": other}, r"damaged download \(me/model: config.json\): .*, twice", []),
    "too much": (CONFIG, {"content": lambda content: content * 9}, r"damaged download \(me/model: config.json\)", []),
    "500 for the list": ("api", busy(500), "config.json is not in the local cache, and the Hub answers 500 in 4", [1, 2, 4]),
    "503 for a file": (CONFIG, busy(503), r"\(me/model: config.json\): the Hub answers 503 in 4 tries", [1, 2, 4]),
    "429 for the list": ("api", busy(429, "5"), r"fewer requests \(429 in 4 tries\). Fix: wait some minutes", [5, 5, 5]),
    "401": ("api", busy(401), r"refuses it \(401\).* private or gated.* Fix: check the name; .*`hf auth login`", []),
    "403": ("api", busy(403), r"refuses it \(403\).* Fix: check the name; .*`hf auth login`", []),
    "403 for a file": (CONFIG, busy(403), r"\(me/model: config.json\): the Hub refuses it \(403\)", []),
    "404": ("api", busy(404), r"no repository of that name.* \(404\). Fix: check the name: OWNER/NAME", []),
    "404 for a file": (CONFIG, busy(404), r"\(me/model: config.json\): the Hub has no .* \(404\)", []),
    "a login page": ("api", {"content": lambda _: HTML}, r"no Hub answers at http://.*:\d+ \(\w+: ", []),
    "a login page for a file": (CONFIG, {"content": lambda _: HTML}, "damaged download", []),
    "a list of nothing": ("api", {"content": lambda _: b"[]"}, "no Hub answers", []),
    "no commit": ("api", {"listing": {"sha": None}}, "no Hub answers .*it calls main None", []),
    "a commit that leads out": ("api", {"listing": {"sha": "../../x"}}, r"no Hub answers .*it calls main '\.\./\.\./x'", []),
    "files that are numbers": ("api", {"listing": {"siblings": [1]}}, "no Hub answers", []),
    "no hash": ("api", listed(size=1), "cannot be proved .*without size", []),
    "a hash that leads out": ("api", listed(size=1, blobId="../../../x"), "cannot be proved", []),
    "a size that is text": ("api", listed(size="1", blobId="0" * 40), "cannot be proved", []),
}  # fmt: skip


@pytest.mark.parametrize(("files", "exit_code"), [((), 4), ((CONFIG,), 3)], ids=["model", "files"])
@pytest.mark.parametrize(("name", "fault", "sentence", "pauses"), STAY.values(), ids=STAY)
def test_a_fault_that_stays_is_one_line(
    name: str, fault: Fault, sentence: str, pauses: list[float], files: tuple[str, ...], exit_code: int, fake: FakeHub
) -> None:
    fake.always[name] = fault
    with pytest.raises(LabError, match=sentence) as caught:
        bring(fake, *files)
    assert caught.value.exit_code == exit_code and "\n" not in str(caught.value) and fake.pauses == pauses


def test_weights_that_always_break_off_are_asked_for_four_times(fake: FakeHub, cache: Path) -> None:
    fake.always[WEIGHTS] = {"cut": 66_000}
    with pytest.raises(CheckpointError, match=r"\(me/model: model.safetensors\): .* in 4 tries"):
        bring(fake)
    assert fake.pauses == [1, 2, 4] and fake.got().count(WEIGHTS) == 4
    fake.always.clear()
    assert contents(bring(fake)) == MODEL  # the fifth goes on
    assert "range" in fake.asked[-1][2] and not list(cache.rglob("*.incomplete"))


def test_an_endless_answer_is_left(fake: FakeHub) -> None:
    fake.always[WEIGHTS] = {"length": 2**28}
    with pytest.raises(CheckpointError, match="damaged download"):
        bring(fake)
    assert 0 < fake.sent < 2**27 and fake.got().count(WEIGHTS) == 2


def test_nobody_is_there(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        CheckpointError, match=r"config.json is not in .* cache, and no Hub answers at http://127.0.0.1:1 in 4"
    ):
        bring(fake)
    assert fake.pauses == [1, 2, 4]


def test_only_pickles_are_refused(fake: FakeHub) -> None:
    fake.commit({CONFIG: b"{}"} | ELSE)
    with pytest.raises(
        UntrustedFileError, match=r"no model.safetensors, and 'pytorch_model.bin' is a pickle"
    ) as caught:
        bring(fake)
    assert caught.value.exit_code == 8 and not fake.got()
    fake.commit({CONFIG: b"{}", "model.gguf": b""})
    with pytest.raises(CheckpointError, match=r"no weights .*neither model.safetensors nor"):
        bring(fake)


def test_a_cache_that_cannot_be_is_one_line(fake: FakeHub, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("no folder")
    with pytest.raises(ConfigError, match=r"no place for downloads \(.*Fix: set HF_HOME"):
        bring(fake)


# --- One commit -------------------------------------------------------------------------------------------------------

NEWER = {CONFIG: b'{"model_type": "gpt2", "n_layer": 1}', WEIGHTS: Random(1).randbytes(100_000), "vocab.json": b"{}"}


def test_a_repository_that_moves_between_two_files(fake: FakeHub) -> None:
    first = fake.refs["main"]
    fake.after = lambda name: void(fake.refs["main"] == first and fake.commit(NEWER))
    assert contents(bring(fake)) == MODEL and fake.refs["main"] != first
    assert contents(bring(fake)) == NEWER
    assert contents(bring(fake, name=f"{NAME}@{first}")) == MODEL


def void(_: Any) -> None:
    """For lambdas that return nothing."""


def test_a_revision_is_pinned(fake: FakeHub) -> None:
    first = fake.refs["main"]
    for revision in ("v1.0", "refs/pr/1"):
        fake.commit(NEWER, branch=revision)
        assert contents(bring(fake, name=f"{NAME}@{revision}")) == NEWER
    assert contents(bring(fake)) == MODEL
    newer = fake.commit(NEWER)
    assert contents(bring(fake, name=f"{NAME}@{first}")) == MODEL != contents(bring(fake, name=f"{NAME}@{newer}"))
    fake.always["api"] = {"listing": {"sha": newer}}
    with pytest.raises(DataError, match=f"it calls {first} '{newer}'"):
        bring(fake, "README.md", name=f"{NAME}@{first}")


def test_an_update_that_fails_leaves_what_was(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bring(fake)
    fake.commit(NEWER)
    fake.always[WEIGHTS] = {"cut": 0}
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        bring(fake)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert bring(fake) == before and contents(before) == MODEL
    fake.always.clear()
    assert contents(bring(fake)) == NEWER


# --- Without a network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [{"drop": 1}, busy(500), busy(429, "9"), busy(401), busy(404), {"content": lambda _: HTML}]
)
def test_what_the_cache_has_needs_no_hub(fault: Fault, fake: FakeHub) -> None:
    folder = bring(fake)
    fake.always["api"] = fault
    assert bring(fake) == bring(fake, *TOKENIZER) == folder and not fake.pauses
    with pytest.raises(DataError, match=r"README.md is not in the local cache, and "):
        bring(fake, "README.md")
    with pytest.raises(CheckpointError, match=r"config.json is not in the local cache, and "):
        bring(fake, name=f"{NAME}@v2")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is not in the local cache, and "):
        bring(fake)


def test_offline_by_the_environment(fake: FakeHub, cache: Path) -> None:
    home = cache.parent
    for names, exit_code in (([NAME], 4), ([NAME, *TOKENIZER], 3)):
        done = in_a_child(fake, home, *names, HF_HUB_OFFLINE="1")
        assert done.returncode == exit_code and done.stdout.count("\n") == 1 and not done.stderr
        assert "is not in the local cache, and HF_HUB_OFFLINE is set. Fix: run once without" in done.stdout
    assert not fake.asked
    done = in_a_child(fake, home, NAME)
    assert done.returncode == 0 and not done.stderr and contents(Path(done.stdout.strip())) == MODEL
    fake.asked.clear()
    assert in_a_child(fake, home, NAME, HF_HUB_OFFLINE="1").stdout == done.stdout and not fake.asked


# --- Shards -----------------------------------------------------------------------------------------------------------

SHARDS = {f"model-0000{n}-of-00002.safetensors": Random(n).randbytes(1000) for n in (1, 2)}


def sharded(*names: Any, **more: bytes) -> dict[str, bytes]:
    index = json.dumps({"weight_map": {f"h.{n}": name for n, name in enumerate(names)}}).encode()
    return {CONFIG: b"{}", INDEX: index} | SHARDS | more


def test_shards_come_by_their_index(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.commit(sharded(*SHARDS, *SHARDS) | {"other.safetensors": b"no"})
    fake.faults[min(SHARDS)] = [{"cut": 10}]
    folder = bring(fake)
    assert contents(folder) == sharded(*SHARDS, *SHARDS) and fake.pauses == [1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert bring(fake) == folder
    (folder / max(SHARDS)).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is not in the local cache"):
        bring(fake)


def test_one_file_is_taken_before_shards(fake: FakeHub) -> None:
    fake.commit(sharded(*SHARDS) | {WEIGHTS: b"whole"})
    assert contents(bring(fake)) == {CONFIG: b"{}", WEIGHTS: b"whole"}


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "", "..", ".safetensors", "model.bin",
     "a.safetensors\n", "http://x/a.safetensors", "a?b.safetensors", 5, None, ["a.safetensors"], {"a": 1}],
)  # fmt: skip
def test_a_shard_with_a_hostile_name_is_not_asked_for(name: Any, fake: FakeHub) -> None:
    fake.commit(sharded(*SHARDS, name))
    with pytest.raises(CheckpointError, match=r"unusable index \(me/model: model.safetensors.index.json\)"):
        bring(fake)
    assert not set(fake.got()) - {CONFIG, INDEX}


INDICES = {
    "no JSON": (b"{", "it has no map of weights"),
    "a list": (b"[]", "it has no map of weights"),
    "a map that is a list": (b'{"weight_map": []}', "it has no map of weights"),
    "brackets": (b"[" * 100_000, r"it has no map of weights \(RecursionError"),
    "no text": (b"\xff", "it has no map of weights"),
    "too large": (b" " * (4 * 2**20 + 1), "4194305 bytes; 4194304 are allowed"),
    "a shard that is not there": (b'{"weight_map": {"a": "b.safetensors"}}', "the repository has no b.safetensors"),
}


@pytest.mark.parametrize(("index", "sentence"), INDICES.values(), ids=INDICES)
def test_an_index_that_is_none(index: bytes, sentence: str, fake: FakeHub) -> None:
    fake.commit({CONFIG: b"{}", INDEX: index})
    with pytest.raises(CheckpointError, match=sentence):
        bring(fake)
    assert INDEX not in fake.got() or "large" not in sentence


# --- The disk, and others at work ---------------------------------------------------------------------------------------


def test_a_disk_that_is_full_leaves_no_half_file(fake: FakeHub, cache: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = in_a_child(fake, cache.parent, NAME, first=limit)
    assert done.returncode == 5 and done.stdout.startswith(
        f"file too large for this disk or limit ({cache / 'models--me--model'})"
    )
    assert not done.stderr and done.stdout.count("\n") == 1 and fake.got().count(WEIGHTS) == 1
    assert not half_files(cache) and not list(cache.rglob(WEIGHTS))
    [aside] = cache.rglob("*.incomplete")
    assert 0 < aside.stat().st_size <= 100_000
    assert contents(bring(fake)) == MODEL and fake.asked[-1][2]["range"] != "bytes=0-"


def test_a_kill_in_the_middle_leaves_no_half_file(fake: FakeHub, cache: Path) -> None:
    fake.faults[WEIGHTS] = [{"cut": 200_000, "stall": True}]
    code = f"from gpt2lab.hub import fetch; fetch({NAME!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=child_environment(fake, cache.parent))
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 60_000 for path in cache.rglob("*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not half_files(cache) and not list(cache.rglob(WEIGHTS))
    assert contents(bring(fake)) == MODEL and not fake.pauses


def test_four_at_once_download_each_file_once(fake: FakeHub) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: bring(fake), range(4)))
    assert len(folders) == 1 and contents(folders.pop()) == MODEL
    assert sorted(fake.got()) == sorted(set(MODEL) - {"merges.txt"})


def test_a_file_of_another_length_is_downloaded_again(fake: FakeHub) -> None:
    folder = bring(fake)
    for name in (WEIGHTS, CONFIG):
        os.truncate((folder / name).resolve(), 5)
    assert half_files(folder.parents[1])  # this is what is looked for at the end of each test
    (folder / VOCAB).resolve().unlink()
    (folder / "tokenizer.json").unlink()
    fake.asked.clear()
    assert contents(bring(fake)) == MODEL and fake.got() == [CONFIG, VOCAB, WEIGHTS]


def test_without_links_there_are_copies(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links on this disk")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        folder = bring(fake)
    assert contents(folder) == MODEL and not any(path.is_symlink() for path in folder.iterdir())
    fake.asked.clear()
    assert bring(fake) == folder and not fake.got()
    for path in folder.iterdir():  # for the look at the end
        path.unlink()


def test_the_library_finds_what_we_brought(fake: FakeHub, cache: Path) -> None:
    folder = bring(fake)
    for name in MODEL:
        assert hf_hub_download(NAME, name, cache_dir=cache, local_files_only=True) == str(folder / name)


def test_we_find_what_the_library_brought(fake: FakeHub, cache: Path) -> None:
    code = f"from huggingface_hub import hf_hub_download\nfor name in {list(MODEL)}: print(hf_hub_download({NAME!r}, name))"
    environment = child_environment(fake, cache.parent)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    fake.asked.clear()
    folder = bring(fake)
    assert (
        done.stdout.split() == [str(folder / name) for name in MODEL] and not fake.got() and contents(folder) == MODEL
    )
