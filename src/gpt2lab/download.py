"""One file from the Hub, gone on with where it broke off; and what a failed request means: whether to ask again, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK = 2**16


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
        with _get(url, headers) as (status, chunks):
            if status != 206:  # from the start: it sends no parts
                file.truncate(0)
                have = 0
            bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None)
            with bar:
                for chunk in chunks:
                    file.write(chunk)
                    bar.update(len(chunk))
                    have += len(chunk)
                    if have > size:
                        return
    if have < size:
        raise ConnectionError(f"it ended after {have} of {size} bytes")


@contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Status and content of an answer, through the library's HTTP client: requests before its release 1.0, then httpx."""
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
            raise _Refused(response)
        yield response.status_code, response.iter_content(_CHUNK) if old else response.iter_bytes(_CHUNK)


class _Refused(Exception):
    """An answer of the Hub that is not the file."""

    def __init__(self, response: Any) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


def may_pass(error: Exception) -> bool:
    """Whether it may be otherwise at the next try: a busy server or a broken line, not a refusal or an answer in no sense."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, ValueError | TypeError | LookupError | AttributeError)


def retry_after(error: Exception) -> int:
    """The seconds that the Hub asks to wait; 0 if it does not say, or says a date."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return int(asked[:9]) if asked.isdecimal() else 0


def words(error: Exception, tries: int) -> tuple[str, str]:
    """Cause and fix of a failed request."""
    from huggingface_hub import constants

    status = _status(error)
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
    cause = f"no Hub answers at {constants.ENDPOINT}{times} ({type(error).__name__}: {str(error)[:200]})"
    return cause, "go online and give the same command again, or give a local folder in its place"


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
