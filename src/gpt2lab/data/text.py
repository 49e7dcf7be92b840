"""A source that was read once: what is in it, and which part of which document goes where when it is read again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gpt2lab.config import DataConfig
from gpt2lab.data.records import Piece
from gpt2lab.data.sources import Reading, no_text, open_source
from gpt2lab.data.survey import Division, Survey, divide, shard_name, survey
from gpt2lab.errors import DataError

MOST_FAULTS = 0.1
"""Where more of the text than this has faults it is in another encoding, or no text: it is refused, not left out."""


@dataclass(frozen=True)
class Text:
    """A source, and its validation text if it has one: read once, and shared out.

    Attributes:
        readings: read again, they must give what was found.
    """

    readings: list[Reading]
    found: Survey
    division: Division

    def parts(self, wanted: Iterable[str]) -> Iterator[Piece]:
        """The parts of documents that lie in these shards, one after the other; each is named as its shard, ``train-00000``.

        Raises:
            DataError: the source is no longer what it was.
        """
        asked, cuts, shards = frozenset(wanted), self.division.cuts, self.division.shards
        number = at = 0
        for piece in (item for reading in self.readings for item in reading() if isinstance(item, Piece)):
            end = at + len(piece.text)
            if end > (int(self.found.chars[number]) if number < len(self.found) else 0):
                raise changed(piece.name)
            cut = int(cuts[number]) if end else 0
            sides = [("train", piece.text[: max(0, cut - at)], end >= cut)] if at < cut else []
            sides += [("validation", piece.text[max(0, cut - at) :], piece.last)] if end > cut else []
            for split, text, last in sides:
                if (name := shard_name(split, int(shards[split][number]))) in asked:
                    yield Piece(name, text, last, piece.scored)
            number, at = (number + (end > 0), 0) if piece.last else (number, end)
        if number != len(self.found):
            raise changed("its end")


def read_text(config: DataConfig) -> Text:
    """The first reading of a recipe's text.

    Raises:
        DataError: there is no such text, or nothing in it is text.
    """
    sources = [config.sources, *([(config.validation,)] if config.validation is not None else [])]
    readings = [open_source(source, config.fields) for source in sources]
    surveys = [survey(reading(), stop=config.on_fault == "stop") for reading in readings]
    for source, found in zip(sources, surveys, strict=True):
        if not len(found) or found.faulty_bytes > MOST_FAULTS * (found.bytes + found.faulty_bytes):
            raise no_text(source, found.skipped)
    if config.validation is None:
        return Text(readings, surveys[0], divide(surveys[0]))
    held_out = np.repeat([False, True], [len(found) for found in surveys])
    found = surveys[0] + surveys[1]
    return Text(readings, found, divide(found, held_out))


def changed(where: str) -> DataError:
    """The error for a source that two readings find different."""
    cause = f"its second reading differs from its first at {where}"
    return DataError("the text changed", where="data.source", cause=cause, fix="try again when nobody writes to it")
