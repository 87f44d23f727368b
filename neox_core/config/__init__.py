"""Typed, frozen, nested configuration."""

from neox_core.config.batch import BatchGeometry, batch_geometry
from neox_core.config.load import load_config, parse_config, read_yaml
from neox_core.config.schema import (
    BaseModelConfig,
    DataConfig,
    EvaluateConfig,
    LaunchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StorageConfig,
    TokenizeJobConfig,
    TokenizerConfig,
    TrainConfig,
    ValidationConfig,
    WandbConfig,
)

__all__ = [
    "BaseModelConfig",
    "BatchGeometry",
    "DataConfig",
    "EvaluateConfig",
    "LaunchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StorageConfig",
    "TokenizeJobConfig",
    "TokenizerConfig",
    "TrainConfig",
    "ValidationConfig",
    "WandbConfig",
    "batch_geometry",
    "load_config",
    "parse_config",
    "read_yaml",
]
