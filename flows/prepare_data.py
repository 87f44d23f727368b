"""Flow: text to token datasets."""

from __future__ import annotations

from prefect import flow

from flows.cancellation import cancel_jobs_of_run
from flows.stage_flow import Row, run_stage_flow
from neox_core.config import RunConfig
from tasks.prepare import ledger, prepare
from tasks.stage import StageResult


@flow(name="prepare-data", flow_run_name="prepare-data {config}", on_cancellation=[cancel_jobs_of_run])
def prepare_data(config: str) -> StageResult:
    """Tokenize every source and plan the mixture.

    Args:
        config: path of the run's YAML file.
    """
    return run_stage_flow("prepare-data", config, prepare, ledger_table)


def ledger_table(config: RunConfig, result: StageResult) -> list[Row]:
    """A row per source: what there is, and what the run takes of it."""
    data = ledger(config, result)
    used = {name: {f"run {what}": value for what, value in use.items()} for name, use in data["run"].items()}
    return [{"source": name, **splits["train"], **used.get(name, {})} for name, splits in data["sources"].items()]
