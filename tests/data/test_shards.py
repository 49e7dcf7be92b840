"""Tokens on disk: what is read is what was written, and a file that is not is refused, whenever that happens to it."""

import gc
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.data import shards as module
from gpt2lab.data.batches import Batches
from gpt2lab.data.samples import Contiguous
from gpt2lab.data.shard_format import HEAD_BYTES, ShardHeader, head_bytes
from gpt2lab.data.shard_writer import ShardWriter, finished_shard
from gpt2lab.data.shards import Shards
from gpt2lab.errors import DataError, ResourceError
from gpt2lab.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
END = BYTES.end_of_text
IDS = np.array([*b"First Citizen:", END, *b"Speak", END, END])
BLOCK = 8  # bytes: 4 ids


def write(path: Path, ids: np.ndarray = IDS, block_bytes: int = BLOCK) -> ShardHeader:
    """A shard of ids, and what it says of itself."""
    with ShardWriter(path, BYTES, block_bytes=block_bytes) as writer:
        writer.add(ids, int((ids != END).sum()), documents=int((ids == END).sum()))
        return writer.finish()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "train-00000.bin")
    return tmp_path / "train-00000.bin"


# --- There and back ---------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, END), max_size=30), max_size=8), st.sampled_from([4, 8, 12, 64, 2**18]))
def test_what_is_read_is_what_was_written_however_it_was_handed_over(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], block_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    ids = np.array([i for part in parts for i in part], np.int32)
    said = write(folder / "one.bin", ids, block_bytes)
    with ShardWriter(folder / "many.bin", BYTES, block_bytes=block_bytes) as writer:
        for part in parts:
            text_bytes = sum(i != END for i in part)
            writer.add(np.array(part, np.uint16), text_bytes, documents=part.count(END))
        assert writer.finish() == said
    assert (folder / "one.bin").read_bytes() == (folder / "many.bin").read_bytes()
    shards = Shards([folder / "one.bin"])
    assert shards.read(0, len(ids)).tolist() == ids.tolist()
    assert (len(shards), shards.documents) == (len(ids), (ids == END).sum())
    assert shards.bytes == len(ids) - shards.documents
    shards.verify()
    write(folder / "other.bin", np.append(ids, END), block_bytes)
    assert (folder / "other.bin").read_bytes() != (folder / "one.bin").read_bytes()
    assert Shards([folder / "other.bin"]).fingerprint != shards.fingerprint


def test_the_file_is_what_its_format_says(path: Path) -> None:
    content, size = path.read_bytes(), 2 * len(IDS)
    assert content[:8] == b"gpt2lab\x02" and content[8:40] == hashlib.sha256(content[40:1024]).digest()
    assert np.memmap(path, "<u2", "r", 1024, (len(IDS),)).tolist() == IDS.tolist()
    hashes = [hashlib.sha256(content[at : min(at + BLOCK, 1024 + size)]) for at in range(1024, 1024 + size, BLOCK)]
    assert content[1024 + size :] == b"".join(digest.digest() for digest in hashes) != b""
    assert json.loads(content[40:1024]) == {
        **{"dtype": "<u2", "tokens": len(IDS), "documents": 3, "bytes": len(IDS) - 3, "vocab_size": 257},
        **{"tokenizer": BYTES.fingerprint, "sha256": hashlib.sha256(content[1024 + size :]).hexdigest()},
        **{"block_bytes": BLOCK, "prompts": 0},
    }


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_two_bytes_while_they_fit(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    text = "".join(chr(code) for code in range(2**17) if not 0xD800 <= code < 0xE000)[: vocab_size - 1]
    tokenizer = Tokenizer.chars([text])
    assert tokenizer.vocab_size == vocab_size
    with ShardWriter(tmp_path / "a.bin", tokenizer) as writer:
        writer.add(np.arange(vocab_size), len(text.encode()), documents=1)
        assert writer.finish().dtype == dtype
    assert Shards([tmp_path / "a.bin"]).read(0, vocab_size).tolist() == list(range(vocab_size))
    size, hashes = vocab_size * int(dtype[2]), {"<u2": 1, "<u4": 2}[dtype]
    assert (tmp_path / "a.bin").stat().st_size == 1024 + size + 32 * hashes


def test_many_shards_are_one_text(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 257, 400)
    cuts = [0, 30, 30, 31, 100, 257, 400]  # one of them is empty
    paths = [tmp_path / f"{number}.bin" for number in range(6)]
    headers = [write(path, ids[a:b]) for path, a, b in zip(paths, cuts, cuts[1:], strict=False)]
    write(tmp_path / "one.bin", ids)
    many, one = Shards(paths), Shards([tmp_path / "one.bin"])
    assert [header.tokens for header in many.headers] == [30, 0, 1, 69, 157, 143] and many.headers == headers
    assert (len(many), many.bytes, many.documents) == (len(one), one.bytes, one.documents)
    assert len({many.fingerprint, one.fingerprint, Shards(paths[::-1]).fingerprint, Shards(paths[:5]).fingerprint}) == 4
    assert Shards(paths[::-1]).read(0, 3).tolist() == ids[257:260].tolist() != ids[:3].tolist()

    @given(st.tuples(st.integers(0, 400), st.integers(0, 400)).map(sorted))
    def check(ends: list[int]) -> None:
        start, end = ends
        assert many.read(start, end - start).tolist() == ids[start:end].tolist()

    check()
    samples = [Batches(Contiguous(shards, 30, 0), 4, 4)(2, 0)[0].tolist() for shards in (one, many)]
    assert samples[0] == samples[1]


def test_no_ids_are_an_empty_shard(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", IDS[:0])
    shards = Shards([tmp_path / "a.bin"])
    assert (len(shards), shards.bytes, shards.read(0, 0).tolist()) == (0, 0, [])
    assert list(shards.document_spans(END)) == list(shards.damage()) == []
    assert len(Shards([])) == 0


def test_reading_gives_a_fresh_array_and_the_file_stays_as_it_is(path: Path) -> None:
    shards = Shards([path])
    ids = shards.read(3, 5)
    ids[:] = 0
    assert ids.dtype == np.int64 and shards.read(3, 5).tolist() == IDS[3:8].tolist() != shards.read(4, 5).tolist()


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, len(IDS) + 1), (len(IDS), 1), (3, -1)])
def test_what_is_not_there_is_not_read(start: int, length: int, path: Path) -> None:
    with pytest.raises(IndexError, match=f"of {len(IDS)}"):
        Shards([path]).read(start, length)
    assert Shards([path]).read(len(IDS), 0).tolist() == []


@given(st.lists(st.sampled_from([65, 66, END]), max_size=40), st.booleans())
def test_documents_lie_between_separators(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], separator_first: bool
) -> None:
    path = tmp_path_factory.mktemp("data") / "a.bin"
    write(path, np.array(ids, np.int64))
    texts = "".join({65: "a", 66: "b", END: "|"}[i] for i in ids).split("|")
    if separator_first and not texts[0]:
        del texts[0]
    if not separator_first and not texts[-1]:
        del texts[-1]
    shards = Shards([path])
    shards.separator_first = separator_first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCAN", 3)
        spans = list(shards.document_spans(END))
    assert [shards.read(*span).tolist() for span in spans] == [[65 if c == "a" else 66 for c in text] for text in texts]


# --- Writing: whole or not at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[257], [65, -1], [2**16], [2**16 + 65]])
def test_ids_that_the_tokenizer_does_not_have_are_not_written(ids: list[int], tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin", BYTES) as writer, pytest.raises(ValueError, match="of 257"):
        writer.add(np.array(ids), 1, documents=0)


@pytest.fixture
def here() -> Path:
    """An empty folder."""
    return Path.cwd()


def test_a_shard_is_there_when_it_is_finished_and_not_before(here: Path) -> None:
    with ShardWriter(here / "a.bin", BYTES) as writer:
        writer.add(IDS, 5, documents=3)
        assert not (here / "a.bin").exists()
        assert finished_shard(here / "a.bin", BYTES) is None
    assert not list(here.iterdir())
    header = write(here / "a.bin")
    assert [left.name for left in here.iterdir()] == ["a.bin"]
    assert finished_shard(here / "a.bin", BYTES) == header
    assert finished_shard(here / "a.bin", Tokenizer.chars(["abc"])) is None
    flip(here / "a.bin", 8 * HEAD_BYTES + 3)
    assert finished_shard(here / "a.bin", BYTES) is None


def test_what_a_killed_writer_leaves_is_no_shard_and_in_nobodys_way(here: Path) -> None:
    script = f"""if True:
        import os, pathlib
        import numpy as np
        from gpt2lab.data.shard_writer import ShardWriter
        from gpt2lab.tokenizer import Tokenizer
        writer = ShardWriter(pathlib.Path({str(here / "a.bin")!r}), Tokenizer.bytes())
        writer.add(np.arange(100_000) % 256, 100_000, documents=0)
        os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    [left] = here.iterdir()
    assert left.name == "a.bin.part" and left.stat().st_size > 100_000
    with pytest.raises(DataError, match="damaged shard"):
        Shards([left])
    header = write(here / "a.bin")
    assert [left.name for left in here.iterdir()] == ["a.bin"] and Shards([here / "a.bin"]).headers == [header]


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Lower one of this process's limits. Within a test: what reports on it writes files, too."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.parametrize("size", [512, 100_000, HEAD_BYTES + 200_000 + 5])
def test_a_disk_without_room_leaves_nothing_behind(size: int, here: Path) -> None:
    """In the head, in the ids, in the hashes."""
    with limit(resource.RLIMIT_FSIZE, size), pytest.raises(OSError, match="File too large"):
        write(here / "a.bin", np.tile(IDS, 100_000 // len(IDS)))
    assert not list(here.iterdir())


def test_a_full_disk_does_not_hide_what_went_wrong_before(here: Path) -> None:
    def fail() -> None:
        with ShardWriter(here / "a.bin", BYTES) as writer:
            writer.add(IDS, 19, documents=3)  # still in memory
            raise KeyError("the cause")

    with limit(resource.RLIMIT_FSIZE, 512), pytest.raises(KeyError, match="the cause"):
        fail()
    assert not list(here.iterdir())


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spied_fsync(handle: int) -> None:
        calls.append("sync of " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def spied_replace(path: Path, target: Path) -> Path:
        calls.append(f"{path.name} to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(Path, "replace", spied_replace)
    write(tmp_path / "a.bin")
    assert calls == ["sync of a.bin.part", "a.bin.part to a.bin", f"sync of {tmp_path.name}"]


# --- Files that lie ---------------------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file, in its place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        [byte] = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_is_found_and_spoils_its_block_alone(path: Path) -> None:
    whole = path.read_bytes()
    found = 0
    for bit in range(8 * len(whole)):
        flip(path, bit)
        place = bit // 8 - HEAD_BYTES
        if 0 <= place < 2 * len(IDS):
            shards, block = Shards([path]), place // BLOCK
            for start in range(0, len(IDS), 4):
                ids = IDS[start : start + 4]
                if start // 4 == block:
                    with pytest.raises(DataError, match=f"byte {HEAD_BYTES + block * BLOCK}"):
                        shards.read(start, len(ids))
                else:
                    assert shards.read(start, len(ids)).tolist() == ids.tolist()
            [error] = shards.damage()
            assert str(path) in str(error)
        else:
            with pytest.raises(DataError, match=r"train-00000\.bin"):
                Shards([path])
        flip(path, bit)
        found += 1
    assert found == 8 * len(whole) > 9000 and path.read_bytes() == whole
    Shards([path]).verify()


def test_every_other_length_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"train-00000\.bin, byte \d+\)"):
            Shards([path])
    for more in (b"\0", b"\0\0", bytes(32), bytes(34), whole):
        path.write_bytes(whole + more)
        with pytest.raises(DataError, match=f"it has {len(whole) + len(more)} bytes, its header says {len(whole)}"):
            Shards([path])
    path.write_bytes(whole)
    Shards([path]).verify()


def header(**changes: Any) -> Callable[[bytes], bytes]:
    """A shard whose header says something else, with a hash that fits."""

    def lie(content: bytes) -> bytes:
        said = {name: value for name, value in (json.loads(content[40:1024]) | changes).items() if value is not None}
        return sealed(content, json.dumps(said).encode())

    return lie


def sealed(content: bytes, said: bytes) -> bytes:
    """A shard with other bytes for a header, and their hash."""
    filled = said.ljust(984)
    return content[:8] + hashlib.sha256(filled).digest() + filled + content[1024:]


LIES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "another version": lambda content: b"gpt2lab\x03" + content[8:],
    "version 1": lambda content: b"gpt2lab\x01" + content[8:],
    "of another program": lambda content: (20240520).to_bytes(4, "little") + content[4:],
    "a header that is not JSON": lambda content: sealed(content, b'["dtype"'),
    "a list for a header": lambda content: sealed(content, b"[]"),
    "a number for a header": lambda content: sealed(content, b"3"),
    "brackets for a header": lambda content: sealed(content, b"[" * 984),
    "fewer tokens said": header(tokens=3),
    "2**60 tokens said": header(tokens=2**60),
    "minus one token said": header(tokens=-1),
    "tokens as text": header(tokens="many"),
    "tokens as a fraction": header(tokens=float(len(IDS))),
    "true tokens": header(tokens=True),
    "wider ids said": header(dtype="<u4"),
    "wider ids and half of them said": header(dtype="<u4", tokens=11, block_bytes=16),
    "halves said": header(dtype="<f2"),
    "objects said": header(dtype="O"),
    "a list as type": header(dtype=["<u2"]),
    "no vocabulary said": header(vocab_size="all"),
    "a tokenizer that is a number": header(tokenizer=3),
    "another hash said": header(sha256="0" * 64),
    "no hash said": header(sha256=None),
    "half a hash said": header(sha256="0" * 32),
    "other blocks said": header(block_bytes=16),
    "odd blocks said": header(block_bytes=7),
    "no blocks said": header(block_bytes=0),
    "blocks left out": header(block_bytes=None),
    "documents left out": header(documents=None),
    "an unknown key": header(trust="me"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_shard_that_lies_is_refused(lie: Callable[[bytes], bytes], path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(lie(whole))
    with pytest.raises(DataError, match=r"damaged shard \(.*train-00000\.bin, byte \d+\): ") as caught:
        Shards([path])
    assert f"Fix: remove {path.parent} and prepare the text again." in str(caught.value)
    path.write_bytes(header()(whole))
    assert Shards([path]).read(0, 5).tolist() == list(b"First")


@pytest.mark.parametrize("vocab_size", [1, 66, 116, 256, 257])
def test_ids_beyond_the_vocabulary_are_refused_even_where_the_hash_fits(vocab_size: int, path: Path) -> None:
    path.write_bytes(header(vocab_size=vocab_size)(path.read_bytes()))
    shards, beyond = Shards([path]), np.flatnonzero(vocab_size <= IDS)
    assert len(beyond) == {1: 22, 66: 20, 116: 6, 256: 3, 257: 0}[vocab_size]
    for index in range(len(IDS)):
        in_block = beyond[beyond // 4 == index // 4]
        if len(in_block):
            with pytest.raises(
                DataError, match=f"byte {1024 + 2 * in_block[0]}.* beyond the vocabulary.* {vocab_size}"
            ):
                shards.read(index, 1)
        else:
            assert shards.read(index, 1).tolist() == [IDS[index]]
    assert len(list(shards.damage())) == len(set(beyond // 4))


def test_all_damage_is_listed(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "b.bin")
    shards = Shards([path, tmp_path / "b.bin"])
    for file, byte in ((path, 1024 + 3), (path, 1024 + 21), (tmp_path / "b.bin", 1024)):
        flip(file, 8 * byte)
    named = [error.where for error in Shards([path, tmp_path / "b.bin"]).damage()]
    assert named == [f"{path}, byte 1024", f"{path}, byte 1040", f"{tmp_path / 'b.bin'}, byte 1024"]
    with pytest.raises(DataError, match="bytes 1024 to 1031 are not the ids that were written"):
        shards.verify()


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, os.mkfifo], ids=["nothing", "a folder", "a pipe"])
def test_what_is_no_file_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin\): (No such file|it is not a file)"):
        Shards([tmp_path / "a.bin"])


def test_too_many_open_files_are_no_damage(path: Path) -> None:
    with limit(resource.RLIMIT_NOFILE, 3), pytest.raises(ResourceError, match="too many open files"):
        Shards([path])


def test_files_are_closed_when_nobody_reads_them(path: Path) -> None:
    gc.collect()  # what other tests have left
    before = psutil.Process().num_fds()
    shards = Shards([path, path])
    os.utime(path)
    shards.read(0, 3)
    assert psutil.Process().num_fds() == before + 2
    del shards
    assert psutil.Process().num_fds() == before
    flip(path, 100)
    with pytest.raises(DataError) as refused:
        Shards([path])
    assert refused and psutil.Process().num_fds() == before


# --- While it is in use -----------------------------------------------------------------------------------------------


def rewrite(path: Path, content: bytes) -> None:
    """Write into a file in its place, at another time than before even where clocks are coarse."""
    with path.open("r+b") as file:
        file.truncate(len(content))
        file.write(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))


def with_another_id(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1024] ^= 1
    rewrite(path, bytes(content))


def replaced_by_another(path: Path) -> None:
    write(path, IDS[::-1])


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "renamed": lambda path: path.rename(path.with_name("b.bin")),
    "emptied": lambda path: rewrite(path, b""),
    "cut": lambda path: rewrite(path, path.read_bytes()[:-1]),
    "longer": lambda path: rewrite(path, path.read_bytes() + bytes(2)),
    "another id": with_another_id,
    "another shard": replaced_by_another,
    "a folder now": replaced_by_a_folder,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_it_is_in_use_is_noticed(change: Callable[[Path], object], path: Path) -> None:
    whole, shards = path.read_bytes(), Shards([path])
    shards.verify()
    change(path)
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-00000\.bin"):
            shards.read(0, 3)
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    assert shards.read(0, 3).tolist() == IDS[:3].tolist()


SAME: dict[str, Callable[[Path], object]] = {
    "touched": lambda path: os.utime(path),
    "of another mode": lambda path: path.chmod(0o600),
    "copied over": lambda path: (shutil.copy(path, path.with_name("b")), path.with_name("b").replace(path)),
    "written again": lambda path: rewrite(path, path.read_bytes()),
    "made again": write,
    "away and back": lambda path: path.rename(path.with_name("b")).rename(path),
    "looked for from elsewhere": lambda path: os.chdir(path.parent.parent),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_a_file_that_holds_the_same_is_read_on(
    change: Callable[[Path], object], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    shards = Shards([Path(path.name)])
    shards.read(0, 3)
    change(path)
    assert shards.read(0, len(IDS)).tolist() == IDS.tolist()


# --- Large, and many at once ------------------------------------------------------------------------------------------


READER = """
import hashlib, pathlib, sys
from gpt2lab.data.shards import Shards
shards, digest = Shards([pathlib.Path(sys.argv[1])]), hashlib.sha256()
for _ in range(3):
    for at in range(0, len(shards), 997):
        digest.update(shards.read(at, min(997, len(shards) - at)).astype("<u2").tobytes())
print(digest.hexdigest())
"""


def test_processes_and_threads_read_one_file_at_once(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 257, 100_000)
    write(tmp_path / "a.bin", ids, 2**12)
    command = [sys.executable, "-c", READER, str(tmp_path / "a.bin")]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shards = Shards([tmp_path / "a.bin"])

    def check(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, 99_000, 300).tolist()
        return all((shards.read(start, 1000) == ids[start : start + 1000]).all() for start in starts)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(check, range(4)))
    digest = hashlib.sha256(ids.astype("<u2").tobytes() * 3).hexdigest()
    assert [reader.communicate()[0].strip() for reader in readers] == [digest] * 2


BOUNDED = """
import pathlib, resource, sys
import numpy as np
from gpt2lab.data.shards import Shards
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, -1))
large, vast = (Shards([pathlib.Path(name)]) for name in sys.argv[1:])
large.verify()
print(sum(1 for span in large.document_spans(256)), vast.read(len(vast) - 3, 3).tolist())
try:
    np.memmap(sys.argv[1], "<u2")
except OSError as error:
    print("mapped:", error.strerror)
"""


def test_memory_does_not_depend_on_the_size(tmp_path: Path) -> None:
    """64 MiB are enough to check 256 MiB and scan them, and to open 8 GiB; a map is refused, so the limit holds."""
    names = []
    for size in (2**28, 2**33):
        hashes = hashlib.sha256(bytes(2**18)).digest() * (size // 2**18)
        said = ShardHeader("<u2", size // 2, 0, 0, 257, BYTES.fingerprint, hashlib.sha256(hashes).hexdigest(), 2**18)
        names.append(str(tmp_path / f"{size}.bin"))
        with open(names[-1], "wb") as file:
            file.write(head_bytes(said))
            file.seek(1024 + size)
            file.write(hashes)
    command = [sys.executable, "-c", BOUNDED, *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split("\n") == ["1 [0, 0, 0]", "mapped: Cannot allocate memory", ""], result.stderr


# --- Format 1 ---------------------------------------------------------------------------------------------------------


def in_format_1(ids: np.ndarray, dtype: str) -> bytes:
    content = ids.astype(dtype).tobytes()
    said = {"dtype": dtype, "tokens": len(ids), "documents": 3, "bytes": 19, "vocab_size": 257, "tokenizer": "a" * 64}
    encoded = json.dumps(said | {"sha256": hashlib.sha256(content).hexdigest()}).encode()
    encoded += b" " * (-(12 + len(encoded)) % 64)
    return b"gpt2lab\x01" + len(encoded).to_bytes(4, "little") + encoded + content


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_shards_of_format_1_are_read(dtype: str, path: Path) -> None:
    whole = in_format_1(IDS, dtype)
    path.write_bytes(whole)
    shards = Shards([path])
    assert shards.read(2, 9).tolist() == IDS[2:11].tolist()
    assert (len(shards), shards.bytes, shards.documents, list(shards.damage())) == (22, 19, 3, [])
    digest = hashlib.sha256(IDS.astype(dtype).tobytes()).hexdigest()
    assert shards.fingerprint == hashlib.sha256(("a" * 64 + digest).encode()).hexdigest()
    for byte in range(len(whole) - IDS.astype(dtype).nbytes, len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 8]) + whole[byte + 1 :])
        with pytest.raises(DataError, match="are not the ids that were written"):
            Shards([path]).read(0, 1)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged shard"):
            Shards([path])
    path.write_bytes(in_format_1(IDS[:0], dtype))
    assert len(Shards([path])) == 0
