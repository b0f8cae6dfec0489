"""Many questions to one OpenAI-compatible server: so many at a time, repeated when they are lost, answers as they come.

What can pass is repeated with growing pauses, or after the pause the server asks for; what cannot (a wrong key, an unknown model)
stops the command at once; and so does a server that has answered nothing for a while, rather than wait for each question's last
try. The key is read from the environment, and blotted out wherever an error repeats it.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from mpo_megatron.config import ConfigError, EndpointConfig
from mpo_megatron.data import DataError

_FIRST_PAUSE = 0.5
"""Seconds before the first repetition; doubled for each further one."""
_LATER = {408, 409, 429}
"""Refusals, besides 5xx, that may pass."""
_FATAL = {401, 403, 404, 405}
"""Refusals that concern every question."""
_MIN_LOST = 8
"""So many questions in a row, and at least as many as are under way at a time, must be lost for the server to count as down."""


class UnusableAnswerError(ValueError):
    """The server answered with something that is no answer to the question."""


type Outcome[Answer] = tuple[int, Answer | None, str | None]
"""What became of one question: its position, and an answer or why there is none."""


class Client:
    """A server, asked through the package `openai`."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._key = os.environ.get(config.api_key_env, "")

    def ask_all[Question, Answer](
        self, questions: Sequence[Question], ask: Callable[[Any, Question], Awaitable[Answer]]
    ) -> Iterator[Outcome[Answer]]:
        """Put every question to the server, `concurrency` at a time; outcomes in the order they come.

        Args:
            questions: what to ask
            ask: puts one question to an `openai.AsyncOpenAI`; raises `UnusableAnswerError` for an answer of no use
        Raises:
            ConfigError: the server refuses the key, or does not know the model or the address.
            DataError: the server has answered nothing for a while.
        """
        outcomes: queue.SimpleQueue[Outcome[Answer] | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def run() -> None:
            try:
                asyncio.run(self._run(questions, ask, outcomes, stop))
                outcomes.put(None)
            except BaseException as error:  # noqa: BLE001 - carried over to the thread that asked
                outcomes.put(error)

        thread = threading.Thread(target=run, name="endpoint", daemon=True)
        thread.start()
        try:
            while (outcome := outcomes.get()) is not None:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            stop.set()
            thread.join()

    async def _run[Question, Answer](
        self,
        questions: Sequence[Question],
        ask: Callable[[Any, Question], Awaitable[Answer]],
        outcomes: queue.SimpleQueue[Any],
        stop: threading.Event,
    ) -> None:
        import openai

        config = self.config
        waiting = iter(enumerate(questions))
        lost_in_a_row = 0
        client = openai.AsyncOpenAI(base_url=config.base_url, api_key=self._key or "none", timeout=config.timeout, max_retries=0)

        async def work() -> None:
            nonlocal lost_in_a_row
            for index, question in waiting:
                answer, error, alive = await self._ask(client, question, ask)
                outcomes.put((index, answer, error))
                lost_in_a_row = 0 if alive else lost_in_a_row + 1
                if lost_in_a_row >= max(_MIN_LOST, config.concurrency):
                    raise DataError(
                        f"{config.base_url}: the last {lost_in_a_row} questions got no answer, each tried {config.retries + 1} "
                        f"times; the last: {error}. Answers that came are kept; see to the server, then run this again."
                    )

        async def watch() -> None:
            while not stop.is_set():
                await asyncio.sleep(0.05)

        async with client:
            workers: asyncio.Future[Any] = asyncio.gather(
                *(work() for _ in range(min(config.concurrency, max(1, len(questions)))))
            )
            watcher: asyncio.Future[Any] = asyncio.create_task(watch())
            try:
                await asyncio.wait({workers, watcher}, return_when=asyncio.FIRST_COMPLETED)
                if workers.done():
                    workers.result()
            finally:
                for task in (workers, watcher):
                    task.cancel()
                await asyncio.gather(workers, watcher, return_exceptions=True)

    async def _ask[Question, Answer](
        self, client: Any, question: Question, ask: Callable[[Any, Question], Awaitable[Answer]]
    ) -> tuple[Answer | None, str | None, bool]:
        """An answer, or why there is none after the last try; and whether the server deals with questions at all."""
        import openai

        reason = ""
        for attempt in range(self.config.retries + 1):
            pause = min(self.config.max_wait, _FIRST_PAUSE * 2**attempt) * random.uniform(0.75, 1.0)  # not all at once
            try:
                return await ask(client, question), None, True
            except openai.APIStatusError as error:
                reason = self._blot(f"{error.status_code}: {error.message}")
                if error.status_code in _FATAL:
                    raise ConfigError(self._explain(error.status_code, reason)) from None  # the cause may hold the key
                if error.status_code not in _LATER and error.status_code < 500:
                    return None, reason, True  # it is this question that it refuses
                pause = _retry_after(error.response.headers.get("retry-after"), pause, self.config.max_wait)
            except openai.APITimeoutError:
                reason = f"no answer within {self.config.timeout:g} s"
            except openai.APIConnectionError as error:
                reason = self._blot(f"no connection: {error.__cause__ or error}")
            except (openai.APIResponseValidationError, UnusableAnswerError, ValueError) as error:  # ValueError: not JSON
                reason = self._blot(f"no usable answer: {error}")
            if attempt < self.config.retries:
                await asyncio.sleep(pause)
        return None, reason, False

    def _blot(self, text: str) -> str:
        text = text if len(text) <= 400 else text[:400] + "…"
        return text.replace(self._key, "…") if self._key else text

    def _explain(self, status: int, reason: str) -> str:
        if status in (401, 403):
            found = "the key that is there is refused" if self._key else "it is not set"
            return f"endpoint.api_key_env = {self.config.api_key_env}; {found} by {self.config.base_url} ({reason})."
        return (
            f"endpoint.base_url = {self.config.base_url}, model = {self.config.model}, api = {self.config.api}; the server does "
            f"not know one of them ({reason})."
        )


def _retry_after(header: str | None, pause: float, longest: float) -> float:
    """Seconds to wait: what the server says (seconds, or a date), at most `longest`; else `pause`."""
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
