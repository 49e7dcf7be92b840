"""safetensors without trust: what the library writes is read to the bit, and a header that is not true is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from gpt2lab.tensors import DTYPES, read_header, tensors_in

DRAWN = {dtype: torch.arange(12).to(dtype).view(3, 4) for dtype in DTYPES.values()}


def file_of(header: Any, data: bytes = b"") -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def about(**changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | changes


@pytest.mark.parametrize("dtype", DRAWN, ids=str)
def test_every_dtype_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    tensors = {"a": DRAWN[dtype], "b": DRAWN[dtype].flip(0).contiguous(), "none": DRAWN[dtype][:0].contiguous()}
    found = tensors_in(bytearray(save(tensors, {"said": "by hand"})))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor)
    assert not torch.equal(found["a"], tensors["b"])


def test_a_header_says_where_the_bytes_of_a_file_are(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(5, 3), "y": torch.randn(7)}
    save_file(tensors, tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    with (tmp_path / "f").open("rb") as file:
        entries = read_header(file)
    for name, entry in entries.items():
        size = tensors[name].numel() * 4
        assert entry.shape == tuple(tensors[name].shape)
        assert content[entry.offset : entry.offset + size] == tensors[name].numpy().tobytes()


def test_numbers_that_lie_at_an_odd_place_are_read() -> None:
    """The format allows it: one byte, then floats."""
    floats = torch.tensor([1.5, -2.0])
    header = {"a": about(shape=[1], data_offsets=[0, 1]), "b": about(dtype="F32", shape=[2], data_offsets=[1, 9])}
    found = tensors_in(file_of(header, b"\x07" + floats.numpy().tobytes()))
    assert found["a"].tolist() == [7] and torch.equal(found["b"], floats)


REFUSED: dict[str, tuple[bytearray, str]] = {
    "empty": (bytearray(), "shorter than its header"),
    "a length alone": (bytearray((2**60).to_bytes(8, "little")), "shorter than its header"),
    "no JSON": (file_of(b"\x80\x04cos\nsystem\n"), "no JSON"),
    "a list": (file_of([]), "no list of at most"),
    "deep": (file_of(b"[" * 100_000), "no JSON"),
    "twice": (file_of(b'{"a": 1, "a": 2}'), "'a' stands there twice"),
    "200000 tensors": (file_of({f"{n}": 0 for n in range(200_000)}), "no list of at most 10000"),
    "200000 times the same key": (file_of(b"{" + b",".join([b'"a":0'] * 200_000) + b"}"), "stands there twice"),
    "no offsets": (file_of({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "cannot be"),
    "three offsets": (file_of({"a": about(data_offsets=[0, 2, 4])}, b"1234"), "cannot be"),
    "an unknown dtype": (file_of({"a": about(dtype="Q8")}, b"1234"), "cannot be"),
    "a shape of other bytes": (file_of({"a": about(shape=[5])}, b"1234"), "cannot be"),
    "a shape whose product overflows": (file_of({"a": about(shape=[2**32, 2**32, 4])}, b"1234"), "cannot be"),
    "a shape of fractions": (file_of({"a": about(shape=[4.0])}, b"1234"), "cannot be"),
    "a shape of truths": (file_of({"a": about(shape=[True, 4])}, b"1234"), "cannot be"),
    "nine dimensions": (file_of({"a": about(shape=[1] * 8 + [4])}, b"1234"), "cannot be"),
    "a negative offset": (file_of({"a": about(data_offsets=[-4, 0])}, b"1234"), "cannot be"),
    "overlapping": (file_of({"a": about(), "b": about(data_offsets=[2, 6])}, b"123456"), "begins at byte 2"),
    "a hole": (file_of({"a": about(), "b": about(data_offsets=[6, 10])}, b"1234567890"), "begins at byte 6"),
    "bytes of no tensor": (file_of({"a": about()}, b"12345"), "4 bytes, but 5 are there"),
    "bytes missing": (file_of({"a": about()}, b"123"), "4 bytes, but 3 are there"),
}


@pytest.mark.parametrize(("content", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_header_that_is_not_true_is_refused(content: bytearray, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        tensors_in(content)
    (tmp_path / "f").write_bytes(content)
    with (tmp_path / "f").open("rb") as file, pytest.raises(ValueError, match=r"\S"):
        read_header(file)


@settings(max_examples=300)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), length=st.integers(0, 10_000))
def test_a_changed_or_cut_file_is_tensors_or_a_refusal(place: int, byte: int, length: int) -> None:
    content = bytearray(save({"x": torch.ones(3, 2), "y": torch.ones(4, dtype=torch.int16)}))
    content[place % len(content)] = byte
    cut = content[: max(8, length % (2 * len(content)))]
    try:
        found = tensors_in(cut)
    except ValueError:
        return
    assert all(isinstance(tensor.sum().item(), int | float | bool) for tensor in found.values())
