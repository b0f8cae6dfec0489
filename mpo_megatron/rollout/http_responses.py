"""A server's HTTP responses: bodies of bounded size, reasons for a refusal, waits that it asks for."""

from __future__ import annotations

import email.utils
import time
from collections.abc import AsyncIterator
from typing import Any

MAX_BODY_BYTES = 16 * 2**20
"""Largest body of an answer: 10⁵ tokens, as text and as ids, plus as many prompt ids, take 3 MB."""


class UnusableAnswerError(ValueError):
    """The server's answer cannot be used."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(reason)
        self.label = label
        """The label this kind of answer is counted under, for example `filtered`."""


def read_refusal(error: Any) -> str:
    """The server's reason for refusing a request: the message in its body, else the whole body."""
    message = error.body.get("message") if isinstance(error.body, dict) else error.body
    return message if isinstance(message, str) else str(error.response.text).strip()


async def bound_body(response: Any) -> None:
    """Limit the body of a response to `MAX_BODY_BYTES`.

    Raises:
        UnusableAnswerError: the body is compressed although the request forbade it.
    """
    encoding = response.headers.get("content-encoding", "identity")
    if encoding not in ("identity", ""):
        await response.aclose()
        raise UnusableAnswerError("compressed", f"its body is compressed ({encoding}), which the request did not allow")
    response.stream = _bounded_stream(response.stream)


def _bounded_stream(stream: Any) -> Any:
    """A stream of the same kind that raises `UnusableAnswerError` after `MAX_BODY_BYTES`."""
    base: Any = next(kind for kind in type(stream).__mro__ if kind.__name__ == "AsyncByteStream")  # of httpx, or of httpx2

    class Bounded(base):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            total = 0
            async for chunk in stream:
                total += len(chunk)
                if total > MAX_BODY_BYTES:
                    raise UnusableAnswerError("too_large", f"its body is larger than {MAX_BODY_BYTES:,} bytes")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


def retry_after(header: str | None, pause: float, longest: float) -> float:
    """Seconds to wait: the server's Retry-After (seconds, or a date), at most `longest`; else `pause`."""
    if header is None:
        return pause
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return pause
    return min(longest, max(0.0, seconds)) if seconds == seconds else pause
