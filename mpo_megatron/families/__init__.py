"""Model families: the features in a config.json, and the mapping of weights. Needs no Megatron-Core.

family    `Family`: features, never names           rules    weight rules that families share
fields    fields of config.json that all families share   reading  config.json → `Family`
qwen …    one file per family                             published  shapes of published models
"""

from mpo_megatron.families.family import DeltaNet, Experts, Family, LayerAttention, Rope
from mpo_megatron.families.reading import load_family, model_name, read_family

__all__ = ["DeltaNet", "Experts", "Family", "LayerAttention", "Rope", "load_family", "model_name", "read_family"]
