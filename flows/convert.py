"""Flow: Meta's or Hugging Face's weights to NeoX shards."""

from __future__ import annotations

from prefect import flow

from flows.flow_runs.names import run_name
from flows.stage_flow import run_stage_flow
from tasks.identity.specs import CONVERT
from tasks.identity.stage import StageResult


@flow(name="convert", flow_run_name=run_name)
def convert(config: str, overrides: list[str] | None = None, force: bool = False) -> StageResult:
    """Cut the base weights for the configured tensor and pipeline parallelism, and prove the result.

    Args:
        config: path of the run's YAML file, from the repository or absolute.
        overrides: key=value texts that override it, such as train.steps=100.
        force: make the stage again, though it is finished.
    """
    return run_stage_flow(CONVERT, config, overrides, force)
