"""The embedded engine: a Hugging Face model and our own sampling loop, on a GPU or the CPU.

`model.generate` does not fit: it uses one random generator for the whole batch. Prompts of similar length run together, padded
on the left. Their keys and values are computed once and shared by all K responses; finished responses leave the batch. The
tokens of a response depend only on its own seed (`sampling.py`).

Shapes: N rows (unfinished responses), P longest prompt of the batch, V vocabulary.
"""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.config import TransformersConfig
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.rollout.engines import FinishReason, Generation, Prompt, Response, Sampling
from mpo_megatron.rollout.engines.sampling import choose_tokens, draw_uniforms
from mpo_megatron.rollout.loading import loading
from mpo_megatron.rollout.models import choose_device, choose_dtype, read_model_settings

ENDED_SHARE = 1 / 8
"""Finished rows leave a batch once there are this many: each removal copies the keys and values of the others."""


@dataclass(kw_only=True, eq=False)
class _Row:
    """One unfinished response."""

    prompt: Prompt
    index: int
    """Index among the requested responses of its prompt."""
    seed: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    """Log-prob of its tokens at temperature 1, in nats, if requested."""


class EmbeddedEngine:
    """Generates with a `transformers` model in this process."""

    def __init__(self, model: Any, tokenizer: Tokenizer, *, batch_size: int) -> None:
        """Use a causal language model in evaluation mode that keeps keys and values (`use_cache`)."""
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        # transformers 5.24 renamed the argument, and 5.40 will drop the old name.
        self._cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, config: TransformersConfig, adapter: Path | None = None) -> EmbeddedEngine:
        """Load a checkpoint.

        Args:
            adapter: PEFT folder of an adapter, which is merged into the weights
        Raises:
            ConfigError: transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM  # seconds to import

        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device, read_model_settings(folder))
        with loading(f"model = {folder}; transformers"):
            if adapter is not None:
                model = load_merged(folder, adapter, dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False
                )
        return cls(model.to(device).eval(), tokenizer, batch_size=config.batch_size)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer prompts of similar length together; yield a group when its last response ends."""
        waiting = {prompt.group_id: len(prompt.response_seeds(sampling)) for prompt in prompts}
        done: dict[str, dict[int, Response]] = {prompt.group_id: {} for prompt in prompts}
        for rows in self._batches(prompts, sampling):
            for row, response in self._run(rows, sampling):
                group_id = row.prompt.group_id
                done[group_id][row.index] = response
                if len(done[group_id]) == waiting[group_id]:
                    responses = done.pop(group_id)
                    yield Generation(group_id=group_id, responses=tuple(responses[index] for index in sorted(responses)))

    def _batches(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[list[_Row]]:
        """Batches of rows, longest prompts first: a batch that does not fit fails at once. A prompt's rows are adjacent."""
        ordered = sorted(prompts, key=lambda prompt: (-len(prompt.token_ids), prompt.group_id))
        rows = [
            _Row(prompt=prompt, index=index, seed=seed)
            for prompt in ordered
            for index, seed in enumerate(prompt.response_seeds(sampling))
        ]
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    @torch.inference_mode()
    def _run(self, rows: list[_Row], sampling: Sampling) -> list[tuple[_Row, Response]]:
        """Answer all rows of a batch."""
        device = self.model.device
        uniforms = draw_uniforms([row.seed for row in rows], sampling.max_tokens).to(device)
        logits, cache, mask = self._read_prompts(rows)
        finished: list[tuple[_Row, Response]] = []
        going = list(range(len(rows)))
        for step in range(sampling.max_tokens):
            tokens = choose_tokens(
                logits, uniforms[:, step], temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
            )
            if sampling.logps:  # float32: sums over 10⁵ logits
                logps = logits.float().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0].tolist()
                for index in going:
                    rows[index].logps.append(logps[index])
            drawn, ended = tokens.tolist(), set[int]()
            for index in going:
                rows[index].tokens.append(drawn[index])
                reason = self._finish_reason(rows[index], sampling)
                if reason is not None:
                    ended.add(index)
                    finished.append((rows[index], self._respond(rows[index], reason, sampling)))
            going = [index for index in going if index not in ended]
            if not going:
                break
            if len(going) <= (1 - ENDED_SHARE) * len(rows):
                chosen = torch.tensor(going, device=device)
                rows = [rows[index] for index in going]
                tokens, uniforms, mask = tokens[chosen], uniforms[chosen], mask[chosen]
                cache.batch_select_indices(chosen)
                going = list(range(len(rows)))
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, cache)
        return finished

    def _read_prompts(self, rows: list[_Row]) -> tuple[Tensor, Any, Tensor]:
        """Next-token logits [N, V], keys and values, and mask [N, P] of the rows' prompts, each prompt computed once."""
        from mpo_megatron.rollout.engines.cache import build_cache  # imports transformers: seconds

        prompts = list({row.prompt.group_id: row.prompt for row in rows}.values())
        place = {prompt.group_id: index for index, prompt in enumerate(prompts)}
        longest = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, prompt in enumerate(prompts):
            ids[index, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[index, longest - len(prompt.token_ids) :] = 1
        device = self.model.device
        cache, mask = build_cache(self.model.config), mask.to(device)
        logits = self._forward(ids.to(device), mask, cache)
        chosen = torch.tensor([place[row.prompt.group_id] for row in rows], device=device)
        cache.batch_select_indices(chosen)  # repeats each prompt once per response
        return logits[chosen], cache, mask[chosen]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits [N, V] after the last of `ids` [N, T]; extends the cache. Positions count from a row's first token."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **{self._cache: cache}
        )
        logits: Tensor = output.logits[:, -1, : self.tokenizer.vocab_size]  # vocabulary padding is no token
        return logits

    def _finish_reason(self, row: _Row, sampling: Sampling) -> FinishReason | None:
        if row.tokens[-1] in sampling.stop_token_ids or (sampling.stop and self._has_stop(row.tokens, sampling.stop)):
            return "stop"
        return "length" if len(row.tokens) == sampling.max_tokens else None

    def _has_stop(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the response ends with a stop text. A token is at least one byte, which bounds the tokens to decode."""
        tail = self.tokenizer.decode(tokens[-(max(len(text.encode()) for text in stop) + 8) :], skip_special=True)
        return any(text in tail for text in stop)

    def _respond(self, row: _Row, reason: FinishReason, sampling: Sampling) -> Response:
        tokens = row.tokens
        words = tokens[:-1] if tokens[-1] in sampling.stop_token_ids else tokens
        whole = self.tokenizer.decode(words, skip_special=True)
        text = cut_at_stop(whole, sampling.stop)
        return Response(
            text=text,
            finish_reason=reason,
            num_tokens=len(tokens),
            seed=row.seed,
            token_ids=tuple(tokens),
            cut=text != whole,
            logp=math.fsum(row.logps) if sampling.logps else None,
        )

    def close(self) -> None:
        """Free the model's memory."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_merged(folder: Path, adapter: Path, dtype: str) -> Any:
    """The model in `folder` with an adapter merged into its weights; host memory holds the weights twice meanwhile.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    from safetensors.torch import load_file
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from mpo_megatron.families import load_family
    from mpo_megatron.families.rules import OUTPUT
    from mpo_megatron.model.convert_adapter import check_output_copy, read_peft
    from mpo_megatron.model.merging import merge_all, merged_config, merger

    family = load_family(folder)
    shape, matrices = read_peft(adapter, family)
    stored = {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}
    output = family.embedding_name if family.tie_word_embeddings else OUTPUT
    check_output_copy(adapter, folder, lambda first, rows: stored[output][first : first + rows])
    weights = dict(merge_all(family, shape, stored.items(), merger(shape, matrices, None)))
    config = merged_config(family, shape)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # With `auto`, the dtype that config.json declares, as for a model without adapter.
    chosen = getattr(config, "dtype", None) or next(iter(weights.values())).dtype if dtype == "auto" else dtype
    return kind.from_pretrained(None, config=config, state_dict=weights, dtype=chosen)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    places = [text.find(mark) for mark in stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
