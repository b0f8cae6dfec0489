"""The policy: Megatron-Core's transformer that reads packed rows of groups and returns log-probs of response tokens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, ParallelConfig
from mpo_megatron.data.arrays import Int64
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import Adapter, LinearAdapter, linear_adapters
from mpo_megatron.model.adapters import NAME, adapted, freeze_base
from mpo_megatron.model.architecture import build_transformer_config, resolve_model
from mpo_megatron.model.attention import RowLayout
from mpo_megatron.model.attention_backends import attention_function
from mpo_megatron.model.context_parallel import sum_parts, take_part
from mpo_megatron.model.delta_backends import delta_function
from mpo_megatron.model.experts import mark_experts
from mpo_megatron.model.layers import RowKernels, build_block_spec
from mpo_megatron.model.logprobs import Head, WeightGradient, vocab_parallel_statistics
from mpo_megatron.model.parallel import Ranks


class Policy(LanguageModule):
    """One pipeline stage of the policy, or one of its virtual stages (the whole model without pipeline parallelism).

    It has the weights of Megatron-Core's GPTModel, under the same names, and differs in three ways. Rotary angles follow explicit
    position ids, because positions restart after a shared prompt. The last stage returns log-probs of the scored tokens, because
    all logits of a row would not fit in memory. And the output layer has no GEMM: `logprobs` multiplies by its weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layers: TransformerBlockSubmodules,
        *,
        family: Family,
        padded_vocab_size: int,
        logprob_chunk: int,
        groups: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        adapters: dict[str, LinearAdapter] | None = None,
    ) -> None:
        """Set the attributes under the names that Megatron-Core's schedules and optimizers use.

        Args:
            pre_process: whether it starts with the embedding
            post_process: whether it ends with the output layer
            vp_stage: index of this virtual stage in an interleaved schedule
            adapters: adapters by the key of the weight beside them, if only these are trained; of which this class adds the
                output layer's
        """
        super().__init__(config=config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = family.tie_word_embeddings
        self.real_vocab_size, self.padded_vocab_size = family.vocab_size, padded_vocab_size
        self.adapted = adapters is not None
        self.embedding_scale, self.logit_cap = family.embedding_scale, family.logit_cap
        # Not a buffer: it must stay float32 in a bf16 model.
        self.inverse_frequencies = torch.tensor([rope.inverse_frequencies for rope in family.ropes], device=device.device())
        self.rotation_factors = torch.tensor(family.rotation_factors, device=device.device())
        self.logprob_chunk = logprob_chunk
        self.overlap_grad_reduce = False
        """Set by the code that wraps the policy in DistributedDataParallel; see `output_weight_gradient`."""
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab_size,
                max_sequence_length=0,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=layers,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            # Transformer Engine's layers add weight gradients inside the GEMM. Megatron-Core's own layer, of which only the
            # weight is used here, would require NVIDIA's apex for this.
            unfused = copy.copy(config)
            unfused.gradient_accumulation_fusion = False
            plan = (adapters or {}).get("output_layer.weight")
            self.output_layer = (ColumnParallelLinear if plan is None else adapted(ColumnParallelLinear, plan))(
                config.hidden_size,
                padded_vocab_size,
                config=unfused,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and family.tie_word_embeddings,
                tp_group=groups.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def sharded_state_dict(self, prefix: str = "", *arguments: Any, **options: Any) -> dict[str, Any]:
        """Like GPTModel's, which stores no extra state of the output layer; so checkpoints have none."""
        states: dict[str, Any] = super().sharded_state_dict(prefix, *arguments, **options)
        states.pop(f"{prefix}output_layer._extra_state", None)
        for name, state in states.items():
            if name.startswith(f"{prefix}output_layer.{NAME}.") and name.endswith(".lora_B"):
                state.allow_shape_mismatch = True  # as Megatron-Core has it for the weight: its padding may differ
        return states

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Store the hidden states from the previous stage; Megatron-Core's schedules call this."""
        (hidden,) = input_tensor
        self.decoder.set_input_tensor(hidden)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        layout: RowLayout,
        sources: Int64,
        targets: Tensor,
        reference: Head | None = None,
    ) -> Tensor:
        """Log-probs of the row's scored tokens on the last stage, hidden states on the others.

        All arguments describe the whole row. With context parallelism every rank returns all log-probs, and their gradient flows
        to this rank's tokens only.

        Args:
            tokens: [1, T] token ids of one packed row
            position_ids: [1, T] positions, restarting after each shared prompt
            layout: the row's segments
            sources: [S] row index of the token that predicts each scored token
            targets: [S] ids of the scored tokens
            reference: `head` of the reference model, to compute KL(π ‖ π_ref) as well
        Returns:
            [S] log-probs in nats, float32, or [2, S] log-probs and divergences; before the last stage [T, 1, H], with T sharded
                over context-parallel ranks and, with sequence parallelism, over tensor-parallel ones
        """
        hidden = self.hidden_states(tokens, position_ids, layout)
        if not self.post_process:
            return hidden
        context = self.pg_collection.cp
        own = device.upload(self.own_sources(sources))
        found = vocab_parallel_statistics(
            self.head(self.select_sources(hidden, sources)),
            targets[own],
            vocab_size=self.real_vocab_size,
            chunk=self.logprob_chunk,
            tp_group=self.pg_collection.tp,
            reference=None if reference is None else Head(*reference),  # Float16Module makes it a plain tuple
            gradient=self.output_weight_gradient(),
            logit_cap=self.logit_cap,
        )
        result = found.logps if found.kl is None else torch.stack((found.logps, found.kl))
        if context.size() == 1:
            return result
        return sum_parts(result.new_zeros((*result.shape[:-1], len(sources))).index_copy(-1, own, result), context)

    def scored_hidden(self, tokens: Tensor, position_ids: Tensor, layout: RowLayout, sources: Int64) -> Tensor:
        """Last hidden states of this rank's part of `sources`, for a model in one stage: [S (own), H]."""
        return self.select_sources(self.hidden_states(tokens, position_ids, layout), sources)

    def own_sources(self, sources: Int64) -> Int64:
        """[S (own)] those of `sources` in this context-parallel rank's part of the row: all without context parallelism.

        Computed on the host: on a GPU, the data-dependent size would force a synchronization.
        """
        return np.flatnonzero(sources % self.pg_collection.cp.size() == self.pg_collection.cp.rank())

    def select_sources(self, hidden: Tensor, sources: Int64) -> Tensor:
        """Select the hidden states [S (own), H] of its own sources from this stage's output."""
        everything = self.gather_sequence(hidden).squeeze(1)
        return everything[device.upload(sources[self.own_sources(sources)] // self.pg_collection.cp.size())]

    def hidden_states(self, tokens: Tensor, position_ids: Tensor, layout: RowLayout) -> Tensor:
        """Output of this stage's last layer (and the final norm on the last stage) for this rank's tokens of the row.

        [T, 1, H], T sharded over context-parallel ranks and, with sequence parallelism, over tensor-parallel ones.
        """
        tokens, position_ids = (take_part(part, self.pg_collection.cp) for part in (tokens, position_ids))
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        if embedded is not None and self.embedding_scale != 1:
            # Rounded to the compute dtype first, as in `transformers`.
            embedded = embedded * torch.tensor(self.embedding_scale, dtype=embedded.dtype, device=embedded.device)
        if embedded is not None and self.adapted and torch.is_grad_enabled():
            # With a frozen embedding, recomputed layers get gradients only if their input requires one.
            embedded.requires_grad_()
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self.rotary_embeddings(position_ids),
            packed_seq_params=layout,
        )

    def rotary_embeddings(self, position_ids: Tensor) -> Tensor:
        """What the layers of each of the R rotary embeddings need for every token, float32.

        [R, T, 1, 1, D] angles for Transformer Engine's kernel; [R, 2, T, 1, D / 2] their cosines and sines, times
        `Family.rotation_factors`, for ours.
        """
        angles = position_ids[0].float()[:, None] * self.inverse_frequencies[:, None]
        if self.config.apply_rope_fusion:
            return torch.cat((angles, angles), dim=-1)[:, :, None, None]
        return (torch.stack((angles.cos(), angles.sin()), dim=1) * self.rotation_factors[:, None, None, None])[:, :, :, None]

    def gather_sequence(self, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens of this context-parallel rank, on every tensor-parallel rank: [T (/ context), 1, H].

        Backward sums the ranks' gradients: each rank's vocabulary shard contributes a part.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp)
        return copy_to_tensor_model_parallel_region(hidden, group=self.pg_collection.tp)

    def head(self, hidden: Tensor) -> Head:
        """What the logits of these scored tokens [S, H] are computed from, with the output layer's adapter if it is on."""
        if not getattr(self.output_layer, "adapters_on", False):
            return Head(hidden, self.output_weight())
        narrow, up = self.output_layer.adapter.of_head(hidden)
        return Head(hidden, self.output_weight(), narrow, up)

    def head_weights(self) -> list[Tensor]:
        """The weights in `head`, and A."""
        adapter = getattr(self.output_layer, NAME, None)
        return [self.output_weight(), *(() if adapter is None else adapter.parameters())]

    def output_weight(self) -> Tensor:
        """This rank's rows [V, H] of the output projection; the embedding's rows if tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def output_weight_gradient(self) -> WeightGradient | None:
        """Megatron's gradient buffer of the output weight; None before DistributedDataParallel has made one.

        If gradients are reduced during backward, the hook on each weight requires a gradient. A tied weight gets one from its
        use as embedding.
        """
        buffer = getattr(self.output_weight(), "main_grad", None)
        if buffer is None or buffer.dtype is not torch.float32:
            return None
        embeds = self.share_embeddings_and_output_weights and self.pre_process
        return WeightGradient(buffer, announce=self.overlap_grad_reduce and not embeds)


def build_policy(
    family: Family,
    model: ModelConfig,
    parallel: ParallelConfig,
    ranks: Ranks,
    padded_vocab_size: int,
    adapter: Adapter | None = None,
) -> list[torch.nn.Module]:
    """This rank's parts of the policy on its device, weights not yet loaded; in bf16 wrapped in Float16Module.

    One part, or with interleaved pipelining one per virtual stage, in the order of the layers.

    Args:
        adapter: adapters to train beside frozen weights; zeros until initialized or loaded
    Raises:
        ConfigError: something requested is missing: Transformer Engine, or an attention back end.
    """
    model = resolve_model(model, family)
    config = build_transformer_config(family, model, parallel)
    adapters = None if adapter is None else linear_adapters(family, adapter, padded_vocab_size)
    in_blocks = adapter is not None and adapter.quantize != "none"
    parts = []
    for chunk in range(parallel.virtual_pipeline):
        part = Policy(
            config,
            build_block_spec(
                family,
                config,
                model.from_engine,
                ranks.pipeline.rank(),
                chunk,
                RowKernels(attend=attention_function(model.attention), delta_rule=delta_function(model)),
                adapters or {},
                in_blocks=in_blocks,
            ),
            family=family,
            padded_vocab_size=padded_vocab_size,
            logprob_chunk=model.chunk(padded_vocab_size // parallel.tensor, device.gpu_bytes()),
            groups=ranks.groups,
            pre_process=ranks.is_first_stage and chunk == 0,
            post_process=ranks.is_last_stage and chunk == parallel.virtual_pipeline - 1,
            vp_stage=chunk if parallel.virtual_pipeline > 1 else None,
            adapters=adapters,
        ).to(device.device())
        mark_experts(part)
        if adapter is not None:
            freeze_base(part)
        parts.append(Float16Module(config, part) if config.bf16 else part)
    return parts
