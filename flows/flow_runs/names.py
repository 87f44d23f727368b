"""Names in Prefect that tell configurations, trainings and attempts apart."""

from __future__ import annotations

import re

from prefect.runtime import flow_run

from neox_core.config import RunConfig, load_config
from neox_core.errors import LlemmaError
from tasks.identity.training import find_training


def run_name() -> str:
    """The running flow's: flow, configuration, the training's fingerprint once it has one, and the attempt."""
    given = flow_run.parameters
    try:
        config = load_config(given["config"], given.get("overrides") or ())
        training = find_training(config)
        what = f"{config.name} {training.fingerprint[:8]}" if training else config.name
    except (LlemmaError, OSError):  # which the flow itself will raise
        what = str(given["config"])
    attempt = f" attempt {flow_run.run_count}" if (flow_run.run_count or 1) > 1 else ""
    return f"{flow_run.flow_name} {what}{attempt}"


def artifact_key(config: RunConfig, what: str) -> str:
    """A key for Prefect's artifacts, each configuration's own: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{what}-{config.name}".lower()).strip("-")
