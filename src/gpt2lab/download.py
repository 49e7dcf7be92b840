"""One file from the Hub, gone on with where it broke off; and what a failed request to any server means: whether to ask
again, and when."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt2lab.errors import LabError, as_lab_error

CHUNK = 2**16
TRIES, FIRST_PAUSE, LONGEST_PAUSE = 4, 1, 60
"""How often one thing is asked for, and the seconds between; each pause is twice the last, or what the server asks for."""
OFFLINE = "HF_HUB_OFFLINE is set", "run once without HF_HUB_OFFLINE=1, or give a local folder in its place"
"""Cause and fix where nobody may be asked."""

T = TypeVar("T")


def receive(url: str, path: Path, size: int) -> None:
    """Fill a file up to `size` bytes from a server, which may send it elsewhere; stop when there are more."""
    from huggingface_hub.utils import build_hf_headers, tqdm

    with path.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
        if (have := os.fstat(file.fileno()).st_size) == size:
            return
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with get(url, headers) as answer:
            if answer.status != 206:  # from the start: it sends no parts
                file.truncate(0)
                have = 0
            bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None)
            with bar:
                for chunk in answer.chunks:
                    file.write(chunk)
                    bar.update(len(chunk))
                    have += len(chunk)
                    if have > size:
                        return
    if have < size:
        raise ConnectionError(f"it ended after {have} of {size} bytes")


@dataclass(frozen=True)
class Answer:
    """What a server sends: its content is as it lies there, whatever it is packed in."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


class Refused(Exception):
    """An answer of a server that is not the file."""

    def __init__(self, response: Any) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


@contextmanager
def get(url: str, headers: dict[str, str]) -> Iterator[Answer]:
    """An answer, through the Hub library's HTTP client: requests before its release 1.0, then httpx.

    Raises:
        Refused: it is neither the file nor a part of it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    old = hasattr(session, "mount")
    if old:
        answer = session.get(url, headers=headers, stream=True, timeout=seconds)
    else:
        answer = session.stream("GET", url, headers=headers, follow_redirects=True, timeout=seconds)
    with answer as response:
        if response.status_code not in (200, 206):
            raise Refused(response)
        chunks = response.raw.stream(CHUNK, decode_content=False) if old else response.iter_raw()
        yield Answer(response.status_code, response.headers, chunks)


def patiently(
    ask: Callable[[], T],
    tries: int,
    sleep: Callable[[float], None],
    refusal: Callable[[str, str], LabError],
    explain: Callable[[Exception, int], tuple[str, str]] | None = None,
) -> T:
    """`ask()`, again after a pause where that may help.

    Args:
        refusal: the error for a cause and a fix.
        explain: cause and fix of what was raised, and after how many tries; None: `words`.

    Raises:
        LabError: the refusal; or what is about this machine, as it is.
    """
    for tried in range(tries):
        try:
            return ask()
        except Exception as error:  # the HTTP client's types change between the library's releases
            if as_lab_error(error) or getattr(error, "filename", None):
                raise  # it is about this machine
            if tried == tries - 1 or not may_pass(error):
                raise refusal(*(explain or words)(error, tried + 1)) from None
            sleep(min(LONGEST_PAUSE, max(FIRST_PAUSE * 2**tried, retry_after(error))))
    raise AssertionError("no tries")


def may_pass(error: Exception) -> bool:
    """Whether it may be otherwise at the next try: a busy server or a broken line, not a refusal or an answer in no sense."""
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, ValueError | TypeError | LookupError | AttributeError)


def retry_after(error: Exception) -> int:
    """The seconds that a server asks to wait; 0 if it does not say, or says a date."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return int(asked[:9]) if asked.isdecimal() else 0


def words(error: Exception, tries: int) -> tuple[str, str]:
    """Cause and fix of a failed request."""
    from huggingface_hub import constants

    status = status_of(error)
    if status in (401, 403):
        cause = f"the Hub refuses it ({status}): it is private or gated, or there is none of that name"
        return cause, "check the name; if it is right, ask for access on its page, then log in with `hf auth login`"
    if status in (404, 410):
        cause = f"the Hub has no repository of that name, or not that revision or file ({status})"
        return cause, "check the name: OWNER/NAME, or OWNER/NAME@REVISION"
    times = f" in {tries} tries" if tries > 1 else ""
    if status == 429:
        return f"the Hub wants fewer requests (429{times})", "wait some minutes, or log in with `hf auth login`"
    if status is not None:
        return f"the Hub answers {status}{times}", "try again later, or give a local folder in its place"
    cause = f"no Hub answers at {constants.ENDPOINT}{times} ({brief(error)})"
    return cause, "go online and give the same command again, or give a local folder in its place"


def status_of(error: Exception) -> int | None:
    """The status of the answer that an error is about, if there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def brief(error: Exception) -> str:
    """An error's kind and words, without the users, passwords and queries of addresses in it: they may be secrets."""
    text = re.sub(r"[?][^\s'\")]*", "?...", re.sub(r"//[^/\s]*@", "//", str(error)))
    return f"{type(error).__name__}: {text[:200]}"
