"""Send many requests to one OpenAI-compatible server: `concurrency` at a time, each bounded in time and size.

Outcomes of a request:

- an answer;
- `unusable`: the server answered, but with nothing usable (no JSON, no text, filtered, too large). Retry with another seed;
- `refused`: the server refuses this request (4xx). A retry gets the same answer;
- `lost`: no answer after all retries (no connection, timeout, 408, 409, 429, 5xx). Each retry waits longer than the last, or as
  long as the server asks.

A wrong key, an unknown model, a redirect, or a server that stops answering or refuses everything ends the command. The key comes
from the environment and is removed from every message. Prompts and key go to `base_url` only.
"""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import random
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from mpo_megatron.config import ConfigError, EndpointConfig, require
from mpo_megatron.files import DataError
from mpo_megatron.rollout.http_responses import UnusableAnswerError, bound_body, read_refusal, retry_after
from mpo_megatron.rollout.model_names import is_version
from mpo_megatron.rollout.proxies import describe_proxy, find_proxy
from mpo_megatron.terminal.visible import visible

_FIRST_PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one."""
_LATER = {408, 409, 425, 429}
"""Client-error statuses that may pass: retried like 5xx."""
_FATAL = {401, 403, 404, 405}
"""Statuses that concern every request, not only this one."""
_MIN_LOST = 8
"""A server counts as down after this many consecutive lost requests, and at least as many as run concurrently."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
"""Control characters in a server's text, which must not reach a terminal or a log."""


class Failure(NamedTuple):
    """Why a request has no answer."""

    kind: Literal["unusable", "refused", "lost"]
    label: str
    """The label it is counted under."""
    reason: str


class Outcome[Answer](NamedTuple):
    """The outcome of one request: an answer, or the reason for its absence."""

    position: int
    """Index of the question in the sequence passed to `ask_all`."""
    answer: Answer | None
    failure: Failure | None = None


class Client:
    """A client of one server, through the package `openai`."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._key = os.environ.get(config.api_key_env, "")
        self._proxy = find_proxy(config.base_url)
        self._other_models: set[str] = set()
        require(
            all("!" <= character <= "~" for character in self._key),
            f"endpoint.api_key_env = {config.api_key_env}; the key in this variable holds a space, a line break or "
            "another character that no key has; set it again.",
        )

    def ask_all[Question, Answer](
        self, questions: Sequence[Question], ask: Callable[[Any, Question], Awaitable[Answer]]
    ) -> Iterator[Outcome[Answer]]:
        """Send every question to the server, `concurrency` at a time; yield outcomes in order of arrival.

        Args:
            questions: what to ask
            ask: sends one request through an `openai.AsyncOpenAI`; raises `UnusableAnswerError` for an unusable answer
        Raises:
            ConfigError: the server refuses the key, or does not know the model or the address.
            DataError: the server has stopped answering, or refuses everything.
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

    def ask_one[Question, Answer](self, question: Question, ask: Callable[[Any, Question], Awaitable[Answer]]) -> Outcome[Answer]:
        """Send one question to the server.

        Raises:
            ConfigError: as in `ask_all`.
        """
        [outcome] = self.ask_all([question], ask)
        return outcome

    def find_other_model(self, answer: Any, requested: str) -> str | None:
        """The model that an answer comes from, if it is another than requested; prints each such name once.

        Names may differ in their folder and in a version: `org/model` may answer as `/models/model-2024-08-06`.
        """
        served = answer.get("model") if isinstance(answer, dict) else None
        if not isinstance(served, str) or is_version(served, requested):
            return None
        served = self._clean(served)
        if served not in self._other_models:
            self._other_models.add(served)
            text = f"{self.config.base_url} answers as {served}, but endpoint.model = {requested}; check the server's model."
            print(visible(f"WARNING: {text}"), file=sys.stderr)
        return served

    async def _run[Question, Answer](
        self,
        questions: Sequence[Question],
        ask: Callable[[Any, Question], Awaitable[Answer]],
        outcomes: queue.SimpleQueue[Any],
        stop: threading.Event,
    ) -> None:
        config = self.config
        waiting = iter(enumerate(questions))
        tally = _Tally(config)

        async def work(client: Any) -> None:
            for position, question in waiting:
                answer, failure = await self._ask(client, question, ask)
                outcomes.put(Outcome(position, answer, failure))
                tally.add(failure)

        async def watch() -> None:
            while not stop.is_set():
                await asyncio.sleep(0.05)

        async with self._open() as client:
            workers: asyncio.Future[Any] = asyncio.gather(
                *(work(client) for _ in range(min(config.concurrency, max(1, len(questions)))))
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

    @functools.cached_property
    def _tls(self) -> Any:
        """One TLS context for all connections: the HTTP client would build a new one for each, which takes 50 ms."""
        import openai

        kind = next(kind for kind in openai.DefaultAsyncHttpxClient.__mro__ if kind.__name__ == "AsyncClient")
        package = sys.modules[kind.__module__.partition(".")[0]]  # httpx, or httpx2
        return package.create_ssl_context()

    def _open(self) -> Any:
        """An `openai.AsyncOpenAI` that reads only bounded bodies, and follows no redirect.

        Raises:
            ConfigError: the proxy cannot be used.
        """
        import openai

        try:
            http_client = openai.DefaultAsyncHttpxClient(
                verify=self._tls,
                timeout=None,  # the deadline in `_ask` bounds a request as a whole
                headers={"accept-encoding": "identity"},  # a small compressed body can expand a thousandfold
                event_hooks={"response": [bound_body]},
                follow_redirects=False,  # prompts would go to another host
                trust_env=False,
                proxy=self._proxy,
            )
        except (ImportError, ValueError) as error:  # SOCKS needs a package; an address may be malformed
            raise ConfigError(
                f"the proxy {describe_proxy(str(self._proxy))} of the environment cannot be used ({self._clean(str(error))}); "
                "fix HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or list the server in NO_PROXY."
            ) from None
        return openai.AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self.config.timeout,
            http_client=http_client,
        )

    async def _ask[Question, Answer](
        self, client: Any, question: Question, ask: Callable[[Any, Question], Awaitable[Answer]]
    ) -> tuple[Answer | None, Failure | None]:
        """Send one question; its answer, or why it has none."""
        import openai

        reason = ""
        for attempt in range(self.config.retries + 1):
            # Randomised, so that clients do not retry all at once.
            pause = min(self.config.max_wait, _FIRST_PAUSE * 2**attempt) * random.uniform(0.75, 1.0)
            try:
                async with asyncio.timeout(self.config.timeout):  # total time: the HTTP client's own limit applies to each read
                    return await ask(client, question), None
            except openai.APIStatusError as error:
                reason = self.describe_refusal(error)
                if 300 <= error.status_code < 400:
                    raise ConfigError(self._explain_redirect(error.response)) from None
                if error.status_code in _FATAL:
                    raise ConfigError(self._explain(error.status_code, reason)) from None  # the cause may hold the key
                if error.status_code not in _LATER and error.status_code < 500:
                    return None, Failure("refused", "refused", reason)
                pause = retry_after(error.response.headers.get("retry-after"), pause, self.config.max_wait)
            except (openai.APITimeoutError, TimeoutError):
                reason = f"no answer within {self.config.timeout:g} s"
            except openai.APIConnectionError as error:
                if isinstance(error.__cause__, UnusableAnswerError):  # openai < 3 wraps errors raised while reading the body
                    return None, self._describe(error.__cause__)
                cause = error.__cause__ or error
                through = "" if self._proxy is None else f" (through the proxy {describe_proxy(self._proxy)})"
                reason = self._clean(f"no connection{through}: {str(cause) or type(cause).__name__}")  # a reset has no text
            except ConfigError:  # ConfigError is a ValueError: do not treat it as bad JSON
                raise
            except (UnusableAnswerError, RecursionError, ValueError) as error:
                return None, self._describe(error)
            if attempt < self.config.retries:
                await asyncio.sleep(pause)
        return None, Failure("lost", "lost", reason)

    def _describe(self, error: Exception) -> Failure:
        """Convert an unusable answer into a `Failure`; any ValueError that is not ours comes from decoding JSON."""
        if isinstance(error, UnusableAnswerError):
            return Failure("unusable", error.label, self._clean(str(error)))
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Failure("unusable", "not_json", self._clean(f"its body is not usable JSON: {reason}"))

    def describe_refusal(self, error: Any) -> str:
        """The status and the reason of an `openai.APIStatusError`, cleaned for messages."""
        return self._clean(f"{error.status_code}: {read_refusal(error)}")

    def _clean(self, text: str) -> str:
        """A server's text made safe for messages: short, UTF-8, without control characters and without the key."""
        text = text.replace(self._key, "…") if self._key else text
        text = _CONTROL.sub(" ", text).encode("utf-8", "replace").decode()
        return text if len(text) <= 400 else text[:400] + "…"

    def _explain_redirect(self, response: Any) -> str:
        target = self._clean(response.headers.get("location", "")) or "nowhere"
        return (
            f"endpoint.base_url = {self.config.base_url}; the server redirects to {target} (status {response.status_code}). "
            "Redirects are not followed, because prompts and key would go there; set base_url to the address that answers."
        )

    def _explain(self, status: int, reason: str) -> str:
        if status in (401, 403):
            found = "the key in this variable is refused" if self._key else "it is not set"
            return f"endpoint.api_key_env = {self.config.api_key_env}; {found} by {self.config.base_url} ({reason})."
        return (
            f"endpoint.base_url = {self.config.base_url}, model = {self.config.model}, api = {self.config.api}; the server does "
            f"not know one of these ({reason})."
        )


class _Tally:
    """Counts recent outcomes; ends the command once further requests would fail the same way."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config, self.limit = config, max(_MIN_LOST, config.concurrency)
        self.lost_in_a_row = self.refused = 0
        self.taken = False
        """Whether the server has accepted any request."""

    def add(self, failure: Failure | None) -> None:
        """Count one outcome: a failure, or None for an answer.

        Raises:
            DataError: the server is down, or refuses everything.
        """
        kind = None if failure is None else failure.kind
        self.lost_in_a_row = self.lost_in_a_row + 1 if kind == "lost" else 0
        self.refused += kind == "refused"
        self.taken = self.taken or kind in (None, "unusable")
        reason = "" if failure is None else failure.reason
        if self.lost_in_a_row >= self.limit:
            raise DataError(
                f"{self.config.base_url}: the last {self.lost_in_a_row} questions got no answer, each tried "
                f"{self.config.retries + 1} times; the last: {reason}. Answers that arrived are kept; check the server, then run "
                "this again."
            )
        if self.refused >= self.limit and not self.taken:
            raise DataError(
                f"{self.config.base_url}: the server refuses all of the first {self.refused} questions; the last: {reason}. "
                "Set endpoint.api, endpoint.server and the sampling to values that it accepts."
            )
