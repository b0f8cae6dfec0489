"""The policy: Megatron-Core's GPTModel that reads packed rows of groups and yields log-probs of response tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, ParallelConfig
from mpo_megatron.data.packing import Ints
from mpo_megatron.families import Family
from mpo_megatron.hf.layout import validate_layout
from mpo_megatron.model.architecture import build_block_spec, build_transformer_config, use_transformer_engine
from mpo_megatron.model.attention import RowLayout
from mpo_megatron.model.attention_backends import attention_function, choose_attention
from mpo_megatron.model.context_parallel import sum_parts, take_part
from mpo_megatron.model.experts import mark_experts
from mpo_megatron.model.logprobs import WeightGradient, vocab_parallel_statistics
from mpo_megatron.model.parallel import Ranks


class Policy(GPTModel):
    """One pipeline stage of the policy, or one of its runs of layers (the whole model without pipeline parallelism).

    Two things differ from GPTModel: rotary angles follow explicit position ids, since positions restart after a shared
    prompt; and the last stage returns log-probs of the scored tokens, since all logits of a row would not fit.
    """

    def __init__(self, *, family: Family, logprob_chunk: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.real_vocab_size = family.vocab_size
        # Not a buffer: in bf16 it stays float32.
        self.inverse_frequencies = torch.tensor(family.ropes[0].inverse_frequencies, device=device.device())
        self.logprob_chunk = logprob_chunk
        self.overlap_grad_reduce = False
        """Set by whoever wraps the policy in DistributedDataParallel; see `output_weight_gradient`."""

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        layout: RowLayout,
        sources: Ints,
        targets: Tensor,
        reference: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Log-probs of the row's scored tokens on the last stage, hidden states on the others.

        All arguments describe the whole row, and with context parallelism every rank returns all log-probs; a gradient that
        comes back to them goes on to this rank's tokens only.

        Args:
            tokens: [1, T] token ids of one packed row
            position_ids: [1, T] positions, restarting after each shared prompt
            layout: the row's segments
            sources: [S] index in the row of the token that predicts each scored token
            targets: [S] ids of the scored tokens
            reference: `scored_hidden` and `output_weight` of the reference model, to compute KL(π ‖ π_ref) as well
        Returns:
            [S] log-probs in nats, float32, or [2, S] log-probs and divergences; before the last stage [T, 1, H], T divided over
            context-parallel ranks and, with sequence parallelism, over tensor-parallel ones
        """
        hidden = self.hidden_states(tokens, position_ids, layout)
        if not self.post_process:
            return hidden
        context = self.pg_collection.cp
        own = device.upload(self.own_sources(sources))
        found = vocab_parallel_statistics(
            self.select_sources(hidden, sources),
            self.output_weight(),
            targets[own],
            vocab_size=self.real_vocab_size,
            chunk=self.logprob_chunk,
            tp_group=self.pg_collection.tp,
            reference=reference,
            gradient=self.output_weight_gradient(),
        )
        result = found.logps if found.kl is None else torch.stack((found.logps, found.kl))
        if context.size() == 1:
            return result
        return sum_parts(result.new_zeros((*result.shape[:-1], len(sources))).index_copy(-1, own, result), context)

    def scored_hidden(self, tokens: Tensor, position_ids: Tensor, layout: RowLayout, sources: Ints) -> Tensor:
        """Last hidden states of this rank's part of `sources`, for a model that is all in one stage: [S (own), H]."""
        return self.select_sources(self.hidden_states(tokens, position_ids, layout), sources)

    def own_sources(self, sources: Ints) -> Ints:
        """[S (own)] which of `sources` lie in this context-parallel rank's part of the row: all without context parallelism.

        Found on the host: a GPU would have to be waited for, since their number decides shapes.
        """
        return np.flatnonzero(sources % self.pg_collection.cp.size() == self.pg_collection.cp.rank())

    def select_sources(self, hidden: Tensor, sources: Ints) -> Tensor:
        """From this stage's output to the hidden states [S (own), H] of its own sources."""
        everything = self.gather_sequence(hidden).squeeze(1)
        return everything[device.upload(sources[self.own_sources(sources)] // self.pg_collection.cp.size())]

    def hidden_states(self, tokens: Tensor, position_ids: Tensor, layout: RowLayout) -> Tensor:
        """Output of this stage's last layer (and the final norm on the last stage) for this rank's tokens of the row.

        [T, 1, H], T divided over context-parallel ranks and, with sequence parallelism, over tensor-parallel ones.
        """
        tokens, position_ids = (take_part(part, self.pg_collection.cp) for part in (tokens, position_ids))
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self.rotary_angles(position_ids),
            packed_seq_params=layout,
        )

    def rotary_angles(self, position_ids: Tensor) -> Tensor:
        """Rotary angle of every token and channel: [T, 1, 1, D], float32."""
        angles = torch.outer(position_ids[0].float(), self.inverse_frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def gather_sequence(self, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens of this context-parallel rank on every tensor-parallel rank: [T (/ context), 1, H].

        Backward sums the ranks' gradients: each rank's vocabulary shard contributes a part.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp)
        return copy_to_tensor_model_parallel_region(hidden, group=self.pg_collection.tp)

    def output_weight(self) -> Tensor:
        """This rank's rows [V, H] of the output projection: the embedding's when they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def output_weight_gradient(self) -> WeightGradient | None:
        """Megatron's gradient buffer of the output weight; None before DistributedDataParallel has made one.

        Where gradients are reduced while backward goes on, the hook on each weight insists on a gradient. A tied weight that is
        the embedding's, too, gets one from there.
        """
        buffer = getattr(self.output_weight(), "main_grad", None)
        if buffer is None or buffer.dtype is not torch.float32:
            return None
        embeds = self.share_embeddings_and_output_weights and self.pre_process
        return WeightGradient(buffer, announce=self.overlap_grad_reduce and not embeds)


def build_policy(
    family: Family, model: ModelConfig, parallel: ParallelConfig, ranks: Ranks, padded_vocab_size: int
) -> list[torch.nn.Module]:
    """This rank's parts of the policy on this rank's device, weights not yet loaded; in bf16 wrapped by Float16Module.

    One part, or with interleaved pipelining one for each run of layers, in the order of the layers.

    Raises:
        ConfigError: the layout does not divide the model, or something is asked for that is missing: Transformer Engine, or an
            attention back end.
    """
    validate_layout(family, parallel, padded_vocab_size)
    config = build_transformer_config(family, model, parallel)
    parts = []
    for chunk in range(parallel.virtual_pipeline):
        part = Policy(
            family=family,
            logprob_chunk=model.logprob_chunk,
            config=config,
            transformer_layer_spec=build_block_spec(
                config, use_transformer_engine(model), ranks.pipeline.rank(), chunk, attention_function(choose_attention(model))
            ),
            vocab_size=padded_vocab_size,
            max_sequence_length=family.max_position_embeddings,
            pre_process=ranks.is_first_stage and chunk == 0,
            post_process=ranks.is_last_stage and chunk == parallel.virtual_pipeline - 1,
            share_embeddings_and_output_weights=family.tie_word_embeddings,
            position_embedding_type="rope",
            pg_collection=ranks.groups,
            vp_stage=chunk if parallel.virtual_pipeline > 1 else None,
        ).to(device.device())
        mark_experts(part)
        parts.append(Float16Module(config, part) if config.bf16 else part)
    return parts
