"""The whole configuration: one frozen dataclass per command, one module each, and the only place with defaults.

`parse` turns a YAML file and command-line overrides into a command's dataclass. `__post_init__` checks single fields.
`validate_*` functions check across fields and against the outside world (files, head counts, number of ranks); they run before
anything loads.
"""

from mpo_megatron.config.align import AlignConfig, ChatConfig
from mpo_megatron.config.checks import ConfigError, check_checkpoint, check_writable, is_hub_name, is_hugging_face, require
from mpo_megatron.config.convert import ConvertConfig, validate_convert
from mpo_megatron.config.evaluate import EvaluateConfig, HeldOutConfig, validate_evaluate
from mpo_megatron.config.experts import ExpertsConfig, validate_experts
from mpo_megatron.config.generate import (
    EndpointConfig,
    GenerateConfig,
    TransformersConfig,
    VllmConfig,
    parse_shard,
    validate_endpoint,
    validate_generate,
)
from mpo_megatron.config.inspect import InspectConfig
from mpo_megatron.config.iterate import IterateConfig
from mpo_megatron.config.launch import JobConfig, KubernetesJob, SkypilotJob, SlurmArray, SlurmJob, TorchrunJob
from mpo_megatron.config.lora import LoraConfig
from mpo_megatron.config.model import ModelConfig
from mpo_megatron.config.online import LiveVllmConfig, OnlineConfig
from mpo_megatron.config.parallel import ParallelConfig
from mpo_megatron.config.parsing import build_parser, from_dict, load_yaml, parse, to_dict
from mpo_megatron.config.plan import PlanConfig
from mpo_megatron.config.prepare import PrepareConfig
from mpo_megatron.config.report import ReportConfig
from mpo_megatron.config.score import ScoreConfig, validate_score
from mpo_megatron.config.select import SelectConfig
from mpo_megatron.config.train import (
    CheckpointConfig,
    DataConfig,
    FaultConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    validate_folders,
    validate_held_out,
)
from mpo_megatron.config.unused import validate_unused

__all__ = [
    "AlignConfig",
    "ChatConfig",
    "CheckpointConfig",
    "ConfigError",
    "ConvertConfig",
    "DataConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "ExpertsConfig",
    "FaultConfig",
    "GenerateConfig",
    "HeldOutConfig",
    "InspectConfig",
    "IterateConfig",
    "JobConfig",
    "KubernetesJob",
    "LiveVllmConfig",
    "LoggingConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "PrepareConfig",
    "ReportConfig",
    "ScoreConfig",
    "SelectConfig",
    "SkypilotJob",
    "SlurmArray",
    "SlurmJob",
    "TorchrunJob",
    "TrainConfig",
    "TransformersConfig",
    "VllmConfig",
    "build_parser",
    "check_checkpoint",
    "check_writable",
    "from_dict",
    "is_hub_name",
    "is_hugging_face",
    "load_yaml",
    "parse",
    "parse_shard",
    "require",
    "to_dict",
    "validate_convert",
    "validate_endpoint",
    "validate_evaluate",
    "validate_experts",
    "validate_folders",
    "validate_generate",
    "validate_held_out",
    "validate_score",
    "validate_unused",
]
