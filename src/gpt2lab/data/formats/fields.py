"""Where in a record its text is: a text field, a prompt and its response, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TEXT_NAMES = "text content body document article story passage raw_content page_content markdown code sentence".split()
"""Fields that are taken for the text, the first of them that is there."""

INSTRUCTIONS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("system_prompt", "question", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
"""Prompt-like fields with the response as the last."""
OPTIONAL = frozenset({"input", "context", "system_prompt"})
"""Of these, what a record may leave out, or leave empty."""

KNOWN = frozenset([*TEXT_NAMES, *(name for names in INSTRUCTIONS for name in names)])

CHATS = ("messages", "conversations", "conversation")
"""Fields that hold a list of messages."""
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_ANSWERING = frozenset({"assistant", "gpt", "model", "bot", "chatgpt"})
SAMPLE = 100
"""Records by which the fields are guessed."""
JOIN = "\n"
"""What stands between the parts of a record. One byte, so that a text is never longer than the line of its record."""


class Unfit(ValueError):
    """Why a record, a line or a row gives no text."""


@dataclass(frozen=True)
class Fields:
    """Which fields of a record make its text.

    Attributes:
        kind: a text; an instruction, whose last field is the response; or a chat, whose one field is a list of messages.
        names: of the fields, in the order of the text.
        guessed: whether nobody named them.
    """

    kind: Literal["text", "instruction", "chat"]
    names: tuple[str, ...]
    guessed: bool = True


@dataclass(frozen=True)
class Part:
    """A part of a record's text, and whether it is what a model is to answer: of a plain text, all of it."""

    text: str
    response: bool


def given_fields(names: Sequence[str]) -> Fields:
    """The fields that a user named: one is a text or a chat, of several the last is the response."""
    if len(names) > 1:
        return Fields("instruction", tuple(names), guessed=False)
    return Fields("chat" if names[0] in CHATS else "text", tuple(names), guessed=False)


def guess_fields(records: Sequence[Mapping[str, Any]]) -> Fields | None:
    """The fields of the first records that look most like what is wanted; None where no field holds a text.

    A chat comes first, then a prompt with its response, then a field named as texts are, then the longest.
    """
    lengths = _lengths(records)
    for name in CHATS:
        if any(is_chat(record.get(name)) for record in records):
            return Fields("chat", (name,))
    for instruction in INSTRUCTIONS:
        if all(name in lengths or (name in OPTIONAL and name in records[0]) for name in instruction):
            return Fields("instruction", instruction)
    ranked = sorted(lengths, key=lambda name: (_rank(name), -lengths[name]))
    return Fields("text", (ranked[0],)) if ranked else None


def parts(record: Mapping[str, Any], fields: Fields) -> list[Part]:
    """The parts of a record's text, in order; empty ones are left out.

    Raises:
        Unfit: a field is missing, or is not text.
    """
    if fields.kind == "chat":
        found = _messages(record, fields.names[0])
    else:
        last = fields.names[-1]
        found = [
            Part(_string(record, name), fields.kind == "text" or name == last)
            for name in fields.names
            if name not in OPTIONAL or len(fields.names) == 1 or record.get(name)
        ]
    found = [part for part in found if part.text]
    if not found:
        raise Unfit("empty text")
    return found


def text_of(record: Mapping[str, Any], fields: Fields) -> list[Part]:
    """A record's text: its parts, each on lines of its own, without the names of roles. A line break ends the part before it.

    Raises:
        Unfit: there is none, or not all of it is Unicode.
    """
    *found, last = parts(record, fields)
    try:
        return [Part(_unicode(part.text) + JOIN, part.response) for part in found] + [
            Part(_unicode(last.text), last.response)
        ]
    except UnicodeEncodeError:
        raise Unfit("lone surrogate") from None


def _unicode(text: str) -> str:
    text.encode()
    return text


def _string(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        raise Unfit(f"no field {name!r}")
    value = record[name]
    if value is None:
        raise Unfit("null text")
    if not isinstance(value, str):
        raise Unfit(f"the text is of type {type(value).__name__}")
    return value


def _messages(record: Mapping[str, Any], name: str) -> list[Part]:
    if name not in record:
        raise Unfit(f"no field {name!r}")
    if not is_chat(record[name]):
        raise Unfit("not a list of messages with role and content")
    found = []
    for message in record[name]:
        role, content = next(keys for keys in _MESSAGE_KEYS if keys[0] in message and keys[1] in message)
        found.append(Part(_string(message, content), message[role] in _ANSWERING))
    return found


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, of one of the two usual shapes."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and any(isinstance(message.get(r), str) and c in message for r, c in _MESSAGE_KEYS)
            for message in value
        )
    )


def _lengths(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Characters of each field that could be the text: it has strings, and hardly anything else unless its name is known."""
    lengths = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record[name] for record in records if record.get(name) is not None]
        strings = [value for value in values if isinstance(value, str)]
        if name in KNOWN or 2 * len(strings) > len(values):
            lengths[name] = sum(map(len, strings))
    return {name: length for name, length in lengths.items() if length}


def _rank(name: str) -> int:
    return TEXT_NAMES.index(name.lower()) if name.lower() in TEXT_NAMES else len(TEXT_NAMES)
