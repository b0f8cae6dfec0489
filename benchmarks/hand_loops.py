"""Three training loops as a careful engineer would write them with plain PyTorch and `transformers`, for
`benchmarks.hand_written`.

    padded          a group's prompt + response sequences as one padded batch
    cached prompt   the prompt once through the key/value cache, then the responses as one padded batch; gradients flow
                    through the cache
    one row         prompt and responses in one row, SDPA once per segment: the prompt causally, each response over the
                    prompt and itself

Each computes logits of scored tokens only and uses torch's fused AdamW. Only the loss comes from `mpo_megatron`.

Legend: P prompt tokens, R tokens of the longest response, K responses of a group, T tokens of a row, S scored tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from mpo_megatron.losses import group_loss

Group = tuple[Tensor, list[Tensor], Tensor]
"""Prompt [P], responses (each [its tokens]) and rewards [K]."""

ResponseLogps = Callable[[Any, Tensor, list[Tensor]], Tensor]
"""Maps a model, a prompt and its responses to the responses' log-probs [K]."""


def padded(model: Any, prompt: Tensor, responses: list[Tensor]) -> Tensor:
    """[K] log-probs from a padded batch. Padding comes last, so a causal mask hides it."""
    targets = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True)
    tokens = torch.cat((prompt.expand(len(responses), -1), targets), dim=1)[:, :-1]
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, len(prompt) - 1 :]
    return sum_scored(model, hidden, targets, responses)


def cached_prompt(model: Any, prompt: Tensor, responses: list[Tensor]) -> Tensor:
    """[K] log-probs of responses that continue one cached prompt."""
    targets = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True)
    cache = DynamicCache(config=model.config)
    first = model.model(input_ids=prompt[None], cache=cache, use_cache=True).last_hidden_state[:, -1:]
    cache.batch_repeat_interleave(len(responses))
    others = model.model(input_ids=targets[:, :-1], cache=cache, use_cache=True).last_hidden_state
    return sum_scored(model, torch.cat((first.expand(len(responses), -1, -1), others), dim=1), targets, responses)


def sum_scored(model: Any, hidden: Tensor, targets: Tensor, responses: list[Tensor]) -> Tensor:
    """[K] summed log-probs of targets [K, R] from hidden states [K, R, H]; padding is removed before the output layer."""
    lengths = torch.tensor([len(response) for response in responses])
    scored = torch.arange(targets.shape[1]) < lengths[:, None]
    logps = -F.cross_entropy(model.lm_head(hidden[scored]), targets[scored], reduction="none")
    return torch.stack([part.sum() for part in logps.split(lengths.tolist())])


def one_row(model: Any, prompt: Tensor, responses: list[Tensor]) -> Tensor:
    """[K] log-probs from one row [prompt | y_1 | … | y_K], each response without its last token, which predicts nothing."""
    inputs = [response[:-1] for response in responses]
    lengths = [len(prompt), *(len(part) for part in inputs)]
    positions = torch.cat((torch.arange(len(prompt)), *(len(prompt) + torch.arange(len(part)) for part in inputs)))
    hidden = model.model(
        input_ids=torch.cat((prompt, *inputs))[None],
        position_ids=positions[None],
        attention_mask={"full_attention": None},
        use_cache=False,
        lengths=lengths,
    ).last_hidden_state[0]
    prompt_states, *states = hidden.split(lengths)
    sources = torch.cat([part for own in states for part in (prompt_states[-1:], own)])
    logps = -F.cross_entropy(model.lm_head(sources), torch.cat(responses), reduction="none")
    return torch.stack([part.sum() for part in logps.split([len(response) for response in responses])])


def segment_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, lengths: list[int], **others: Any
) -> tuple[Tensor, None]:
    """Attention of a row of segments; all see the first one: [1, heads, T, D] → [1, T, heads, D]."""
    queries, keys, values = (part.split(lengths, dim=2) for part in (query, key, value))
    attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    outputs = [attend(queries[0], keys[0], values[0], is_causal=True)]
    for own, own_keys, own_values in zip(queries[1:], keys[1:], values[1:], strict=True):
        own_keys, own_values = torch.cat((keys[0], own_keys), dim=2), torch.cat((values[0], own_values), dim=2)
        outputs.append(attend(own, own_keys, own_values, attn_mask=causal_lower_right(own.shape[2], own_keys.shape[2])))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("segments", segment_attention)

LOOPS: dict[str, tuple[ResponseLogps, str]] = {
    "padded": (padded, "sdpa"),
    "cached prompt": (cached_prompt, "sdpa"),
    "one row": (one_row, "segments"),
}
"""Each loop's log-probs, and its attention's name in `transformers`."""


class HandLoop:
    """A loop over groups: one optimizer step per call, one group per micro-batch."""

    def __init__(self, name: str, folder: str, *, lr: float, betas: tuple[float, float], eps: float, clip: float) -> None:
        self.logps, attention = LOOPS[name]
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation=attention
        )
        self.model.train()
        self.clip = clip
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def reference(self, groups: Sequence[Group]) -> list[Tensor]:
        """[K] log-probs of each group's responses, before training."""
        return [self.logps(self.model, prompt, responses) for prompt, responses, _ in groups]

    def step(self, groups: Sequence[Group], references: Sequence[Tensor]) -> float:
        """One optimizer step on the mean loss of the groups, all of which have contrast; that loss."""
        self.adam.zero_grad(set_to_none=True)
        total = 0.0
        for (prompt, responses, rewards), reference in zip(groups, references, strict=True):
            logps = self.logps(self.model, prompt, responses)
            loss = group_loss("mpo", logps[None].double(), reference[None].double(), rewards[None])[0] / len(groups)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        self.adam.step()
        return total
