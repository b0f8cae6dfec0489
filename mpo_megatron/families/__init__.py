"""Model families: the features of a config.json, and where the weights are. Needs no Megatron-Core.

family    `Family`: features, never names           rules    weight rules that families share
fields    what all families read of config.json     reading  config.json → `Family`
qwen …    one file a family                         published  shapes of published models
"""

from mpo_megatron.families.family import DeltaNet, Experts, Family, LayerAttention, Rope
from mpo_megatron.families.reading import load_family, model_name, read_family

__all__ = ["DeltaNet", "Experts", "Family", "LayerAttention", "Rope", "load_family", "model_name", "read_family"]
