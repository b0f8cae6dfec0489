"""Convert a server's answer into a response, or raise why it is none. Fields may be missing, wrong or of any type."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.rollout.engines import Response, Sampling, read_finish_reason
from mpo_megatron.rollout.engines.embedded import cut_at_stop
from mpo_megatron.rollout.http_responses import UnusableAnswerError
from mpo_megatron.rollout.thoughts import Thoughts

_EXTRA_TOKENS = 1
"""A server may count the end token that it sampled at the limit."""
_LONG_PROMPT = 16
"""Characters from which a text that starts with its prompt was not drawn so by chance."""


def read_answer(
    answer: Any,
    *,
    api: Literal["tokens", "text", "chat"],
    seed: int,
    sampling: Sampling,
    tokenizer: Tokenizer,
    thoughts: Thoughts | None,
) -> Response:
    """The response in the decoded body of an answer.

    Args:
        answer: the JSON value
        thoughts: restores a thought or tool calls returned beside the text; None without messages
    Raises:
        UnusableAnswerError: the body holds no response.
        ConfigError: the body holds a thought, and the chat template renders none.
    """
    choice = find_choice(answer)
    message = choice.get("message") if api == "chat" else choice
    if not isinstance(message, dict):
        raise UnusableAnswerError("no_choice", f"its choice has no message ({shorten(choice)})")
    calls = _read_calls(message) if thoughts is not None and thoughts.tools else []
    ended_by_call = calls and choice.get("finish_reason") == "tool_calls"
    reason = read_finish_reason("stop" if ended_by_call else choice.get("finish_reason"))
    only_calls = calls and message.get("content") is None
    text = "" if only_calls else read_text(message, "content" if api == "chat" else "text")
    ids = _read_ids(choice.get("token_ids"), sampling, tokenizer)
    num_tokens = _read_count(answer, ids, sampling)
    drawn = None if ids is None else tokenizer.decode(_without_end(ids, sampling), skip_special=True)
    if drawn is not None and (sampling.logps or _agrees(drawn, text, api)):  # log-probs belong to the tokens, not to the text
        whole = cut_at_stop(drawn, sampling.stop)
        return Response(
            text=whole,
            finish_reason=reason,
            num_tokens=len(ids or ()),
            seed=seed,
            token_ids=tuple(ids or ()),
            cut=whole != drawn,
            logp=_read_logp(choice, len(ids or ())) if sampling.logps else None,
        )
    thought = _read_thought(message)
    if thought is not None or calls:
        assert thoughts is not None
        text = thoughts.put_back(text, thought, calls)
    if num_tokens is None:
        num_tokens = len(tokenizer.encode(text))
    return Response(text=text, finish_reason=reason, num_tokens=num_tokens, seed=seed)


def refuse_echo(text: str, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Raise for a text that starts with the whole prompt.

    Raises:
        UnusableAnswerError: it does; training would learn to repeat the template.
    """
    for prompt in (tokenizer.decode(prompt_ids), tokenizer.decode(prompt_ids, skip_special=True)):
        prompt = prompt.strip()
        if len(prompt) >= _LONG_PROMPT and text.lstrip().startswith(prompt):
            raise UnusableAnswerError("repeats_prompt", "its text starts with the prompt; the server must not echo it")


def _read_logp(choice: dict[str, Any], number: int) -> float | None:
    """The sum of the sampled tokens' log-probs, in nats; None unless the answer has one for each."""
    stated = choice.get("logprobs")
    values = stated.get("token_logprobs") if isinstance(stated, dict) else None
    if not isinstance(values, list) or len(values) != number:
        return None
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0]
    total = math.fsum(numbers)
    return total if len(numbers) == number and math.isfinite(total) else None


def find_choice(answer: Any) -> dict[str, Any]:
    """The first choice of an answer.

    Raises:
        UnusableAnswerError: it has no choice.
    """
    if isinstance(answer, str):  # openai returns a str where the content type is not JSON
        raise UnusableAnswerError("not_json", f"its body is not JSON ({shorten(answer)})")
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise UnusableAnswerError("no_choice", f"it holds no choice ({shorten(answer)})")
    return choice


def read_text(message: dict[str, Any], field: str) -> str:
    """The text of a choice or its message.

    Raises:
        UnusableAnswerError: the field is absent, or not valid Unicode.
    """
    text = message.get(field)
    if isinstance(text, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
        text = "".join(part["text"] for part in text)
    if text is None and message.get("refusal"):
        raise UnusableAnswerError("refusal", f"the model refuses: {shorten(message['refusal'])}")
    if text is None and message.get("tool_calls"):
        raise UnusableAnswerError("tool_call", "it calls a tool, but the request offered none")
    if text is None and _read_thought(message) is not None:
        raise UnusableAnswerError("thought_only", "it holds a thought but no answer; raise max_tokens if this is frequent")
    if not isinstance(text, str):
        raise UnusableAnswerError("no_text", f"its {field} is of type {type(text).__name__}")
    return _check_unicode(text, field)


def _check_unicode(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableAnswerError("not_unicode", f"its {field} has half a surrogate pair at character {error.start}") from None
    return text


def _read_thought(message: dict[str, Any]) -> str | None:
    """The thought beside an answer, in the field of SGLang, DeepSeek and older vLLM, or of newer vLLM."""
    for field in ("reasoning_content", "reasoning"):
        thought = message.get(field)
        if isinstance(thought, str) and thought.strip():
            return _check_unicode(thought, field)
    return None


def _read_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool calls in a message, with decoded arguments, as chat templates expect them.

    Raises:
        UnusableAnswerError: a call has no name, or its arguments are no JSON object.
    """
    calls = []
    for item in message.get("tool_calls") or []:
        function = item.get("function") if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        try:
            values = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            values = None
        if not isinstance(name, str) or not isinstance(values, dict):
            raise UnusableAnswerError("tool_call", f"its call {shorten(item)} lacks a name or a JSON object of arguments")
        calls.append({"type": "function", "function": {"name": name, "arguments": values}})
    return calls


def _read_ids(value: Any, sampling: Sampling, tokenizer: Tokenizer) -> list[int] | None:
    """The sampled token ids, if the server reports them.

    Raises:
        UnusableAnswerError: they are not ids of this tokenizer, or there are too many.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise UnusableAnswerError("bad_tokens", f"its token_ids are {shorten(value)}, not ids")
    wrong = next((item for item in value if not 0 <= item < tokenizer.vocab_size), None)
    if wrong is not None:
        raise UnusableAnswerError(
            "bad_tokens", f"its token_ids hold {shorten(wrong)}, but the tokenizer's vocabulary has {tokenizer.vocab_size}"
        )
    if len(value) > sampling.max_tokens + _EXTRA_TOKENS:
        raise UnusableAnswerError("bad_count", f"it has {len(value)} token_ids, but max_tokens = {sampling.max_tokens}")
    return value


def _read_count(answer: dict[str, Any], ids: Sequence[int] | None, sampling: Sampling) -> int | None:
    """Tokens of the response by the server's count; None if it reports none.

    Raises:
        UnusableAnswerError: the number is impossible.
    """
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if count is None or count == 0:
        return None if ids is None else len(ids)
    if isinstance(count, bool) or not isinstance(count, int):
        raise UnusableAnswerError("bad_count", f"its completion_tokens are {shorten(count)}, not a number of tokens")
    if not 0 < count <= sampling.max_tokens + _EXTRA_TOKENS:
        raise UnusableAnswerError(
            "bad_count", f"its completion_tokens are {shorten(count)}, but max_tokens = {sampling.max_tokens}"
        )
    return count


def _without_end(ids: Sequence[int], sampling: Sampling) -> Sequence[int]:
    return ids[:-1] if ids[-1] in sampling.stop_token_ids else ids


def _agrees(drawn: str, text: str, api: str) -> bool:
    """Whether ids that decode to `drawn` belong to `text`.

    A server may hold back half a character at the end, and stops before a stop text. A chat answer has its thought and
    surrounding white space removed.
    """
    whole, part = drawn.rstrip("\ufffd"), text.rstrip("\ufffd")
    return part.strip() in whole if api == "chat" else whole.startswith(part)


def shorten(value: object) -> str:
    """A value shortened for messages."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of more than 20 digits"  # repr refuses one of more than 4,300
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:120] + "…"
