"""A text thirty times as long takes no more memory; tests/campaigns/large_text.py measures it on 2 GB."""

from pathlib import Path

from tests.campaigns import large_text


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Of all processes together; a third of the longer text would be seen."""
    peaks = []
    for megabytes in (3, 90):
        source = tmp_path / f"{megabytes}.txt"
        source.write_text("".join(f"{number:09} and on.\n" for number in range(megabytes * 10**6 // 18)))
        peak, _ = large_text.prepare(source, "bytes", tmp_path / f"{megabytes}")
        peaks.append(peak)
    assert peaks[0] > 50 * 2**20
    assert peaks[1] - peaks[0] < 30 * 2**20
