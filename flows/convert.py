"""Flow: Meta's weights to NeoX shards."""

from __future__ import annotations

from prefect import flow

from flows.stage_flow import Row, run_stage_flow
from neox_core.config import RunConfig
from tasks.convert import convert as convert_stage
from tasks.stage import StageResult


@flow(name="convert", flow_run_name="convert {config}")
def convert(config: str) -> StageResult:
    """Cut the base weights for the configured tensor and pipeline parallelism, and prove the result.

    Args:
        config: path of the run's YAML file.
    """
    return run_stage_flow("convert", config, convert_stage, proof_table)


def proof_table(config: RunConfig, result: StageResult) -> list[Row]:
    """What the comparison with transformers found, and the files."""
    proof = [{"what": name, "value": value} for name, value in result.artifact.summary.items()]
    return proof + [{"what": file.path, "value": f"{file.size:,} bytes"} for file in result.artifact.files]
