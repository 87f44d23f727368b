"""Flow: Meta's or Hugging Face's weights to NeoX shards."""

from __future__ import annotations

from prefect import flow

from flows.stage_flow import run_stage_flow
from tasks.specs import CONVERT
from tasks.stage import StageResult


@flow(name="convert", flow_run_name="convert {config}")
def convert(config: str, overrides: list[str] | None = None) -> StageResult:
    """Cut the base weights for the configured tensor and pipeline parallelism, and prove the result.

    Args:
        config: path of the run's YAML file.
        overrides: key=value texts that override it, such as train.steps=100.
    """
    return run_stage_flow(CONVERT, config, overrides)
