"""A file on a web server comes as it is, however the line fails; or one line says why it does not."""

import gzip
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from huggingface_hub import constants

from gpt2lab import cli
from gpt2lab.data import kept
from gpt2lab.data.kept import Kept
from gpt2lab.data.remote import RemoteFile, shown
from gpt2lab.data.sources import open_source, read_documents, source_files
from gpt2lab.errors import DataError
from tests.data.web import Fault, Web, serving

CONTENT = Random(0).randbytes(1_000_000)
OTHER = Random(1).randbytes(1_000_000)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 30)
    with serving(CONTENT) as web:
        yield web


@pytest.fixture
def pauses() -> list[float]:
    """What the client would have waited."""
    return []


def read(web: Web, pauses: list[float]) -> bytes:
    with RemoteFile(web.url, sleep=pauses.append).open() as stream:
        assert not stream.seekable()
        return b"".join(iter(lambda: stream.read(70_001), b""))


def complaint(ask: Callable[[], object]) -> str:
    """What the DataError says that this must end with."""
    with pytest.raises(DataError) as caught:
        ask()
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value) and ". Fix: " in str(caught.value)
    return str(caught.value)


# --- Faults that pass -------------------------------------------------------------------------------------------------

PASS: dict[str, tuple[list[Fault], list[float]]] = {
    "nothing": ([], []),
    "the line breaks": ([{"cut": 300_000}], [1]),
    "it breaks three times, and goes on between": ([{"cut": 300_000}] * 3, [1, 1, 1]),
    "it breaks often": ([{"cut": 50_000}] * 19, [1] * 19),
    "it breaks before the first byte": ([{"cut": 0}], [1]),
    "no answer, twice": ([{"drop": 1}] * 2, [1, 2]),
    "no answer after a break": ([{"cut": 70_000}, {"drop": 1}, {"drop": 1}], [1, 2, 4]),
    "500, 502 and 503": ([{"status": status} for status in (500, 502, 503)], [1, 2, 4]),
    "503 after a break, for a minute": ([{"cut": 70_000}] + [{"status": 503}] * 6, [1, 2, 4, 8, 16, 32, 60]),
    "429 that says when": ([{"status": 429, "headers": {"Retry-After": "7"}}], [7]),
    "429 that says a year": ([{"status": 429, "headers": {"Retry-After": "31536000"}}], [60]),
    "429 that says a date": ([{"status": 429, "headers": {"Retry-After": "Fri, 01 Jan 2027 00:00:00 GMT"}}], [1]),
    "silence in the middle": ([{"cut": 300_000, "stall": True}], [1]),
    "silence at the start": ([{"cut": 0, "stall": True}], [1]),
    "in chunks, without a length": ([{"no length": 1}], []),
    "in chunks that break": ([{"no length": 1, "cut": 300_000}], [1]),
    "in chunks that break at the end": ([{"no length": 1, "cut": len(CONTENT)}], [1]),
    "it sends no parts": ([{"cut": 300_000}, {"no ranges": 1}], [1]),
    "it sends no parts, and breaks": ([{"cut": 300_000}, {"no ranges": 1, "cut": 200_000}, {"no ranges": 1}], [1, 2]),
    "its part ends early": ([{"cut": 300_000}, {"short": 400_000}], [1, 1]),
    "its part begins before": ([{"cut": 300_000}, {"from": 7}], [1]),
    "its part begins after, once": ([{"cut": 300_000}, {"from": 900_000}], [1, 2]),
}


@pytest.mark.parametrize(("faults", "waited"), PASS.values(), ids=PASS)
def test_a_fault_that_passes_changes_no_byte(
    faults: list[Fault], waited: list[float], web: Web, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    web.faults = list(faults)
    if any("stall" in fault for fault in faults):
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    assert read(web, pauses) == CONTENT and pauses == waited and not web.faults
    assert all(asked["accept-encoding"] == "identity" for asked in web.asked)


@pytest.mark.parametrize("versions", [{"ETag": '"one"'}, {"Last-Modified": "x"}, {"ETag": 'W/"one"'}, {}])
def test_what_came_is_not_asked_for_again(versions: dict[str, str], web: Web, pauses: list[float]) -> None:
    web.versions, web.faults = versions, [{"cut": 300_000}]
    assert read(web, pauses) == CONTENT
    first, second = web.asked
    start = int(second["range"].removeprefix("bytes=").removesuffix("-"))
    assert "range" not in first and 200_000 < start <= 300_000
    weak = versions.get("ETag", "").startswith("W/")  # a weak one cannot bind a part
    assert second.get("if-range") == (None if weak else next(iter(versions.values()), None))


def test_an_empty_file_is_one(web: Web, pauses: list[float]) -> None:
    web.content = b""
    assert read(web, pauses) == b"" and not pauses


def test_what_is_packed_on_the_way_comes_as_it_lies_there(web: Web, pauses: list[float]) -> None:
    """Some servers say of a .gz that the encoding of the transfer is gzip: places in it are those of the packed bytes."""
    web.content = gzip.compress(CONTENT)
    web.versions |= {"Content-Encoding": "gzip"}
    web.faults = [{"cut": 300_000}]
    assert read(web, pauses) == web.content


def test_memory_is_bounded(web: Web, pauses: list[float]) -> None:
    web.content = bytes(20_000_000)
    web.faults = [{"cut": 9_000_000}, {"no ranges": 1}]
    tracemalloc.start()
    try:
        with RemoteFile(web.url, sleep=pauses.append).open() as stream:
            size = sum(len(data) for data in iter(lambda: stream.read(2**16), b""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 20_000_000 and peak < 5_000_000


def test_a_stream_that_is_left_ends_its_answer(web: Web, pauses: list[float]) -> None:
    web.content = bytes(100_000_000)
    with RemoteFile(web.url, sleep=pauses.append).open() as stream:
        assert stream.read(10) == bytes(10)
    assert len(web.asked) == 1 and web.sent < 20_000_000


# --- Faults that stay -------------------------------------------------------------------------------------------------

STAY: dict[str, tuple[list[Fault], Fault, str, list[float]]] = {
    "403": ([], {"status": 403}, r"the server refuses it \(403\). Fix: check the address: https://USER:", []),
    "404": ([], {"status": 404}, r"no such file \(404\). Fix: check the address", []),
    "410 after a break": ([{"cut": 65_536}], {"status": 410}, r"no such file \(410\), after 65,536 bytes. Fix", [1]),
    "400": ([], {"status": 400}, r"the server refuses it \(400\)", []),
    "416": ([{"cut": 65_536}], {"status": 416}, r"the server refuses it \(416\)", [1]),
    "500": ([], {"status": 500}, "the server answers 500 in 4 tries. Fix: give the same command again later", [1, 2, 4]),
    "429": ([], {"status": 429, "headers": {"Retry-After": "9"}}, r"fewer requests \(429 in 4 tries\)", [9, 9, 9]),
    "nothing": ([], {"drop": 1}, r"no answer in 4 tries \(\w+: .*Fix: go online and give the same command again", [1, 2, 4]),
    "nothing, after a break": (
        [{"cut": 65_536}], {"drop": 1}, "no answer in 8 tries .*, after 65,536 bytes", [1, 2, 4, 8, 16, 32, 60],
    ),
    "a part from elsewhere": ([{"cut": 65_536}], {"from": 900_000}, "in 8 tries .*another part", [1, 2, 4, 8, 16, 32, 60]),
    "a break at one place of a server without parts": (
        [], {"cut": 65_536, "no ranges": 1}, "in 8 tries", [1, 2, 4, 8, 16, 32, 60],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("faults", "always", "sentence", "waited"), STAY.values(), ids=STAY)
def test_a_fault_that_stays_is_one_line(
    faults: list[Fault], always: Fault, sentence: str, waited: list[float], web: Web, pauses: list[float]
) -> None:
    web.faults, web.always = list(faults), always
    said = complaint(lambda: read(web, pauses))
    assert said.startswith(f"cannot be had from its server ({web.url}): ") and re.search(sentence, said)
    assert pauses == waited


def test_offline_by_the_environment_is_said_at_once(
    web: Web, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Fix: run once without HF_HUB_OFFLINE=1" in complaint(lambda: read(web, pauses))
    assert not web.asked and not pauses


# --- A file that changes ----------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, str], bytes, dict[str, str], str]] = {
    "ETag": ({"ETag": '"one"'}, OTHER, {"ETag": '"two"'}, 'its ETag is "two" now, and was "one"'),
    "weak ETag": ({"ETag": 'W/"one"'}, OTHER, {"ETag": 'W/"two"'}, "its ETag is"),
    "date": ({"Last-Modified": "Mon"}, OTHER, {"Last-Modified": "Tue"}, "its Last-Modified is Tue now, and was Mon"),
    "length": ({}, OTHER[:-1], {}, "it has 999,999 bytes now, and had 1,000,000"),
    "shorter than what came": ({}, OTHER[:50], {}, r"refuses it \(416\)"),
}


@pytest.mark.parametrize(("before", "content", "after", "sentence"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_in_the_middle_is_refused(
    before: dict[str, str], content: bytes, after: dict[str, str], sentence: str, web: Web
) -> None:
    web.versions, web.faults = before, [{"cut": 300_000}]

    def change(_: float) -> None:
        web.content, web.versions = content, after

    assert re.search(sentence, complaint(lambda: RemoteFile(web.url, sleep=change).open().read()))


@pytest.mark.parametrize(("before", "content", "after", "sentence"), list(CHANGES.values())[:4], ids=list(CHANGES)[:4])
def test_a_file_that_changes_between_two_readings_is_refused(
    before: dict[str, str], content: bytes, after: dict[str, str], sentence: str, web: Web
) -> None:
    web.versions, file = before, RemoteFile(web.url)
    for _ in range(2):  # the same once more is no change
        assert file.open().read() == CONTENT
    identity = file.identity
    web.content, web.versions = content, after
    assert re.search(sentence, complaint(lambda: file.open().read()))
    assert identity == RemoteFile(web.url).identity.replace("two", "one").replace("Tue", "Mon").replace(
        "999999", "1000000"
    )


def test_an_identity_is_what_the_server_says(web: Web) -> None:
    (file,) = source_files(web.url)
    assert not web.asked, "nobody has asked for it"
    assert file.identity == '"one" 1000000' and file.identity and len(web.asked) == 1
    web.versions, web.always = {}, {"no length": 1}
    assert source_files(web.url)[0].identity == ""


# --- As a source ------------------------------------------------------------------------------------------------------

STORIES = [f"Story {n}: the cat sat on the mat. {Random(n).randbytes(150).hex()}" for n in range(1500)]
LINES = "".join(json.dumps({"text": story}) + "\n" for story in STORIES)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits between two tries."""
    waited: list[float] = []
    init = RemoteFile.__init__
    monkeypatch.setattr(
        RemoteFile, "__init__", lambda self, *args, **more: init(self, *args, **more | {"sleep": waited.append})
    )
    return waited


@pytest.mark.parametrize("name", ["tales.jsonl", "tales.jsonl.gz"])
def test_a_source_at_an_address_gives_the_same_text_as_on_disk(
    name: str, web: Web, quick: list[float], tmp_path: Path
) -> None:
    web.content = gzip.compress(LINES.encode(), mtime=0) if name.endswith("gz") else LINES.encode()
    (tmp_path / name).write_bytes(web.content)
    local = read_documents(str(tmp_path / name))
    web.faults = [{"status": 503}, {"cut": 3_000}, {"cut": 20_000}]
    address = web.url.replace("text.txt", name)
    far = read_documents(address)
    assert [d.text for d in far] == [d.text for d in local] == STORIES and len(quick) == 3
    assert far[0].name == f"{address}:1" and local[0].name == f"{name}:1"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "html", "jsonl.gz", "parquet"])
def test_a_server_that_is_gone_is_no_fault_of_the_file(
    suffix: str, web: Web, quick: list[float], tmp_path: Path
) -> None:
    """No reader takes the error for damage, and goes on with half of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": LINES.split("\n")}), tmp_path / "x.parquet", compression="none")
    web.content = {
        "txt": LINES.encode(),
        "jsonl": LINES.encode(),
        "csv": b"id,text\n" + b"1,the cat sat on the mat\n" * 20_000,
        "html": b"<html><body>" + b"<p>The cat sat on the mat.</p>\n" * 20_000,
        "jsonl.gz": gzip.compress(CONTENT),
        "parquet": (tmp_path / "x.parquet").read_bytes(),
    }[suffix]
    web.faults, web.always = [{"cut": len(web.content) // 2}], {"drop": 1}
    said = complaint(lambda: list(source_files(web.url.replace("txt", suffix))[0].read()))
    assert "no answer in 8 tries" in said and len(quick) == 7


def test_prepared_through_the_command_line(
    web: Web, quick: list[float], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    web.content = LINES.encode()
    (tmp_path / "tales.jsonl").write_bytes(web.content)
    web.faults = [{"cut": 90_000}, {"status": 500}, {"no ranges": 1, "cut": 400_000}]
    fingerprints = []
    for source in (str(tmp_path / "tales.jsonl"), web.url):
        assert cli.run(["data", "prepare", source, "--out", "out", "--json"]) == 0
        fingerprints.append(json.loads(Path("out/prepared.json").read_text())["key"])
    assert fingerprints[0] == fingerprints[1] and len(web.asked) == 4
    web.content = LINES.replace("cat", "dog").encode()
    web.versions = {"ETag": '"two"'}
    assert cli.run(["data", "prepare", web.url, "--out", "dogs", "--json"]) == 0
    assert json.loads(Path("dogs/prepared.json").read_text())["key"] != fingerprints[0]
    capsys.readouterr()


def test_what_is_small_comes_once_and_what_is_large_twice(
    web: Web, quick: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    web.content = LINES.encode()
    for room, times in ((len(web.content), 1), (len(web.content) - 1, 2)):
        monkeypatch.setattr(kept, "ROOM", room)
        web.asked.clear()
        reading = open_source([web.url])
        first = list(reading())
        assert list(reading()) == first and len(first) > len(STORIES) and len(web.asked) == times
        web.asked.clear()
        (file,) = source_files(web.url)  # for those who read once
        assert list(file.read()) == list(file.read()) == first and len(web.asked) == 2


def test_a_copy_is_a_file_like_any_other(web: Web, tmp_path: Path) -> None:
    copies = Kept()
    files = [RemoteFile(f"{web.url}?{n}") for n in range(2)]
    copies.open(files[0]).close()
    web.content = OTHER
    copies.open(files[1]).close()
    for file, content in zip(files, (CONTENT, OTHER), strict=True):
        with copies.open(file) as copy:
            assert copy.seekable() and copy.read(100) == content[:100]
            assert copy.seek(-10, 2) == 999_990 and copy.read() == content[-10:] and copy.read() == b""
            assert copy.seek(500) == 500 and copy.seek(100, 1) == 600 and copy.read(9) == content[600:609]
    assert len(web.asked) == 2


# --- Secrets ----------------------------------------------------------------------------------------------------------

SECRET = "hunter2"


def test_what_may_be_secret_is_not_said(web: Web, quick: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    address = web.url.replace("http://", f"http://me:{SECRET}@") + f"?token={SECRET}#{SECRET}"
    assert shown(address) == web.url
    port = address.replace("127.0.0.1", "127.0.0.1:1:")
    for fault, source in (
        ({"status": 403}, address),
        ({"drop": 1}, address),
        ({}, address),  # no text
        ({}, f"http://127.0.0.1:1/x?token={SECRET}"),
        ({}, port),
        ({}, f"http://me:{SECRET}/x@/"),
        ({}, f"http://me:{SECRET}@/x"),
    ):
        web.always = fault
        assert cli.run(["data", "prepare", source, "--out", "out"]) == 3, source
        out, err = capsys.readouterr()
        assert SECRET not in out + err and err.count("\n") == 1 and "Fix: " in err, err
    web.always, web.content = {}, LINES.encode()
    assert cli.run(["data", "prepare", address, "--out", "out", "--json"]) == 0
    assert web.asked[-1]["authorization"].startswith("Basic "), "the server is told"
    out, err = capsys.readouterr()
    assert SECRET not in out + err and SECRET not in Path("out/prepared.json").read_text()


def test_control_the_words_of_a_client_are_read_for_secrets() -> None:
    from gpt2lab.download import brief

    error = OSError(f"HTTPPool(host='h'): url: /a/b?sig={SECRET} (Caused by 'http://me:{SECRET}@h/x')")
    assert SECRET in str(error) and SECRET not in brief(error) and "/a/b?..." in brief(error)
