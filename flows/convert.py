"""Flow: Meta's weights to NeoX shards."""

from __future__ import annotations

from prefect import flow

from flows.checkpoint_table import checkpoint_table
from flows.stage_flow import run_stage_flow
from tasks.convert import convert as convert_stage
from tasks.stage import StageResult


@flow(name="convert", flow_run_name="convert {config}")
def convert(config: str) -> StageResult:
    """Cut the base weights for the configured tensor and pipeline parallelism, and prove the result.

    Args:
        config: path of the run's YAML file.
    """
    return run_stage_flow("convert", config, convert_stage, checkpoint_table)
