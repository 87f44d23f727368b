"""Flow: the last checkpoint as a Hugging Face model."""

from __future__ import annotations

from prefect import flow

from flows.stage_flow import run_stage_flow
from tasks.specs import EXPORT
from tasks.stage import StageResult


@flow(name="export", flow_run_name="export {config}")
def export(config: str, overrides: list[str] | None = None) -> StageResult:
    """Write the last step's model in Hugging Face's format, and prove that it computes the same.

    Args:
        config: path of the run's YAML file.
        overrides: key=value texts that override it, such as train.steps=100.
    """
    return run_stage_flow(EXPORT, config, overrides)
