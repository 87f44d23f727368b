"""Flow: the last checkpoint as a Hugging Face model."""

from __future__ import annotations

from prefect import flow

from flows.checkpoint_table import checkpoint_table
from flows.stage_flow import run_stage_flow
from tasks.export import export as export_stage
from tasks.stage import StageResult


@flow(name="export", flow_run_name="export {config}")
def export(config: str) -> StageResult:
    """Write the last step's model in Hugging Face's format, and prove that it computes the same.

    Args:
        config: path of the run's YAML file.
    """
    return run_stage_flow("export", config, export_stage, checkpoint_table)
