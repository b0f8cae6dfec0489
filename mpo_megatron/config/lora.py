"""Options of low-rank adapters (LoRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section, prefix="lora."):
    """Train low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685): W + scale · B · A."""

    rank: int = 0
    """Rank of the adapters: rows of A and columns of B; 0 trains all weights instead."""
    alpha: float | None = None
    """scale = alpha / rank; by default alpha is twice the rank, so that scale = 2."""
    rslora: bool = False
    """Use scale = alpha / √rank instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    target_modules: list[str] | str = field(default_factory=lambda: ["all-linear"])
    """Linear layers with an adapter: Hugging Face names, such as [q_proj, v_proj], or `all-linear`, `attention`, `mlp`. None of
    these groups includes the output layer: [all-linear, lm_head]."""

    quantize: Literal["none", "nf4"] | None = None
    """Format of the frozen weights of linear layers: `nf4`, 4 bits each (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); by
    default, that of the adapter in `model.checkpoint`, or `none`."""
    base: str | None = None
    """Folder of the base model, if `model.checkpoint` is an adapter; by default, its folder when the adapter was saved."""

    @property
    def targets(self) -> list[str]:
        """The names in `target_modules`, which may be one name alone, as in PEFT."""
        return [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "target_modules", self.targets)
        require(self.rank >= 0, f"lora.rank = {self.rank}; it must be 0 (off) or positive.")
        require(
            self.alpha is None or 0 < self.alpha < math.inf,
            f"lora.alpha = {self.alpha}; it must be positive.",
        )
        require(
            bool(self.target_modules) and len(set(self.target_modules)) == len(self.target_modules),
            f"lora.target_modules = {self.target_modules}; name at least one layer, each only once.",
        )
        for name, default in (("alpha", None), ("rslora", False), ("target_modules", ["all-linear"])):
            require(
                self.rank > 0 or getattr(self, name) == default,
                f"lora.{name} = {getattr(self, name)} without lora.rank, so there is no adapter; set lora.rank too.",
            )
