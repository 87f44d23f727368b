"""Typed, frozen, nested configuration."""

from neox_core.config.batch import BatchGeometry, batch_geometry, batch_tokens, largest_batch, sequences_before
from neox_core.config.checkpoint_sections import VALIDATION, CheckpointsConfig, ExportConfig
from neox_core.config.data_sections import DataConfig, SourceAmount, SourceConfig, TokenizeJobConfig, WeightChange
from neox_core.config.evaluation_sections import WRITTEN, EvaluateConfig, EvaluationTask, GenerationConfig
from neox_core.config.load import load_config, parse_config
from neox_core.config.model_sections import BaseModelConfig, ModelConfig, RopeScalingConfig
from neox_core.config.schema import (
    EMBEDDED,
    LaunchConfig,
    NotifyConfig,
    ParallelConfig,
    PipelineSchedule,
    RunConfig,
    StorageConfig,
    TokenizerConfig,
    WandbConfig,
)
from neox_core.config.train_sections import (
    ActivationCheckpointing,
    GuardConfig,
    OptimizerConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainChange,
    TrainConfig,
    ValidationConfig,
)
from neox_core.config.yaml_file import read_yaml

__all__ = [
    "EMBEDDED",
    "VALIDATION",
    "WRITTEN",
    "ActivationCheckpointing",
    "BaseModelConfig",
    "BatchGeometry",
    "CheckpointsConfig",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationTask",
    "ExportConfig",
    "GenerationConfig",
    "GuardConfig",
    "LaunchConfig",
    "ModelConfig",
    "NotifyConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PipelineSchedule",
    "ProfileConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceAmount",
    "SourceConfig",
    "StorageConfig",
    "TokenizeJobConfig",
    "TokenizerConfig",
    "TrainChange",
    "TrainConfig",
    "ValidationConfig",
    "WandbConfig",
    "WeightChange",
    "batch_geometry",
    "batch_tokens",
    "largest_batch",
    "load_config",
    "parse_config",
    "read_yaml",
    "sequences_before",
]
