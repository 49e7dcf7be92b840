"""The checksum is that of the standard, at any length and in any pieces."""

import numpy as np

from gpt2lab.weights.crc32c import crc32c
from tests.weights import bundles


def test_the_checksum_is_that_of_the_standard() -> None:
    known = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    for data, checksum in known.items():
        assert crc32c(data) == checksum == bundles.crc32c(data)


def test_the_checksum_is_the_same_at_any_length_and_in_any_pieces() -> None:
    random = np.random.default_rng(0)
    for length in (0, 1, 3, 4, 7, 5684, 5685, 5686, 5685 * 8, 5685 * 8 + 1, 10_008 * 8 - 1, 10_008 * 8 + 13):
        data = random.bytes(length)
        assert crc32c(data) == bundles.crc32c(data), length
        cut = length // 3
        assert crc32c(data[cut:], crc32c(data[:cut])) == bundles.crc32c(data), length


def test_the_checksum_sees_every_bit() -> None:
    data = bytearray(np.random.default_rng(0).bytes(50_000))
    before = crc32c(bytes(data))
    for at in range(0, len(data), 97):
        data[at] ^= 1 << at % 8
        assert crc32c(bytes(data)) != before
        data[at] ^= 1 << at % 8
    assert crc32c(bytes(data)) == before
