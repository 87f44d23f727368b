"""Flow: the last checkpoint as a Hugging Face model."""

from __future__ import annotations

from prefect import flow

from flows.flow_runs.names import run_name
from flows.stage_flow import run_stage_flow
from tasks.identity.specs import EXPORT
from tasks.identity.stage import StageResult


@flow(name="export", flow_run_name=run_name)
def export(config: str, overrides: list[str] | None = None, force: bool = False) -> StageResult:
    """Write the last step's model in Hugging Face's format, and prove that it computes the same.

    Args:
        config: path of the run's YAML file, from the repository or absolute.
        overrides: key=value texts that override it, such as train.steps=100.
        force: make the stage again, though it is finished.
    """
    return run_stage_flow(EXPORT, config, overrides, force)
