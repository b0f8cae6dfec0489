"""Hugging Face sequence classifiers with one output: checked before loading, run in batches of similar length."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.config import require
from mpo_megatron.config.score import ModelScorer
from mpo_megatron.hf.fingerprint import model_digest
from mpo_megatron.rollout.loading import loading
from mpo_megatron.rollout.models import choose_device, choose_dtype, read_model_settings

BALANCED = "balanced"
"""Device name for all GPUs: `transformers` (accelerate) spreads the layers evenly over them."""


class Classifier:
    """Computes one number per token sequence."""

    def __init__(self, name: str, config: ModelScorer) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError: it has another head, lacks weights, or needs code that the configuration does not trust.
        """
        from transformers import AutoModelForSequenceClassification  # seconds to import

        self.name, self.config, self.folder = name, config, Path(config.model)
        self.settings = read_model_settings(self.folder)
        check_head(name, self.settings, config)
        spread = config.device == BALANCED
        device = None if spread else choose_device(config.device)
        with loading(f"scorers.{name}.model = {self.folder}; transformers"):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                str(self.folder),
                dtype=choose_dtype(config.dtype, device, self.settings),
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **({"device_map": BALANCED} if spread else {}),
            )
        missing = sorted(report["missing_keys"])
        require(
            not missing,
            f"scorers.{name}.model = {self.folder}; {len(missing)} weights are missing in the checkpoint, for example "
            f"{missing[0] if missing else ''}: the scores would be random; choose a trained reward model.",
        )
        self.model: Any = model.eval() if device is None else model.to(device).eval()
        limit = self.settings.get("max_position_embeddings")
        self.max_length = min(config.max_length, limit) if isinstance(limit, int) and limit > 0 else config.max_length

    @torch.inference_mode()
    def run(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The output for every sequence of token ids, in order; batches hold sequences of similar length."""
        outputs = [0.0] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            for index, value in zip(chosen, self._run_batch([sequences[index] for index in chosen]).tolist(), strict=True):
                outputs[index] = value
        return outputs

    def _run_batch(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Outputs [N] of sequences padded on the right."""
        longest = max(map(len, sequences))
        pad = self._padding(sequences)
        ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, sequence in enumerate(sequences):
            ids[index, : len(sequence)] = torch.tensor(sequence)
            mask[index, : len(sequence)] = 1
        output = self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device))
        score = getattr(output, "score", None)  # ArmoRM's name for its output
        score = output.logits if score is None else score
        flat: Tensor = score.reshape(len(sequences), -1).float()
        require(
            flat.shape[1] == 1,
            f"scorers.{self.name}.model = {self.folder}; it gives {flat.shape[1]} numbers a response; a reward model gives one.",
        )
        return flat[:, 0].cpu()

    def _padding(self, sequences: Sequence[Sequence[int]]) -> int:
        """The padding id.

        A classifier reads its output at the last token that is not `pad_token_id`. A checkpoint without that setting reads it at
        the last token other than the padding; then the padding must be an id that no sequence of the batch contains.
        """
        if self.settings.get("pad_token_id") is not None:
            return int(self.settings["pad_token_id"])
        used = {token for sequence in sequences for token in sequence}
        pad = next(index for index in range(len(used) + 1) if index not in used)
        self.model.config.pad_token_id = pad
        return pad

    def digest(self) -> str:
        """Fingerprint of the checkpoint."""
        return model_digest(self.folder)

    def close(self) -> None:
        """Free the model's memory."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_head(name: str, settings: Mapping[str, Any], config: ModelScorer) -> None:
    """Refuse a checkpoint whose config.json is not that of a classifier with one output.

    Raises:
        ConfigError: names the architecture, and the expected one.
    """
    where = f"scorers.{name}.model = {config.model}"
    architecture = (settings.get("architectures") or ["no architecture"])[0]
    if settings.get("auto_map"):
        require(
            config.trust_remote_code,
            f"{where}; {architecture} is defined by Python code that comes with the checkpoint; if you trust it, set "
            f"scorers.{name}.trust_remote_code = true.",
        )
        return  # only its own code knows its head
    require(
        architecture.endswith("ForSequenceClassification"),
        f"{where}; the head of {architecture} gives no score; a reward model is a …ForSequenceClassification with one output.",
    )
    labels = settings.get("id2label")
    number = len(labels) if isinstance(labels, dict) else settings.get("num_labels", 2)  # transformers' own default
    require(
        number == 1,
        f"{where}; its head has {number} outputs (classes); a reward model has one (num_labels = 1).",
    )
