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
    SourceAmount,
    SourceConfig,
    StorageConfig,
    TokenizerConfig,
    TrainConfig,
    ValidationConfig,
    WandbConfig,
    WeightChange,
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
    "SourceAmount",
    "SourceConfig",
    "StorageConfig",
    "TokenizerConfig",
    "TrainConfig",
    "ValidationConfig",
    "WandbConfig",
    "WeightChange",
    "batch_geometry",
    "load_config",
    "parse_config",
    "read_yaml",
]
