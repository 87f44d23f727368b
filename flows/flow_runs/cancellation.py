"""What Cancel does beyond ending the flow's process: jobs outlive that, so they are cancelled too."""

from __future__ import annotations

import logging
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from neox_core.config import load_config
from tasks.cancel import cancel_jobs

logger = logging.getLogger(__name__)


def cancel_jobs_of_run(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """Hook for `on_cancellation`: cancel the run's jobs, unless another run follows them.

    The jobs' checkpoints and finished parts stay, so that a later run of the flow resumes.
    """
    given = flow_run.parameters
    for job in cancel_jobs(load_config(given["config"], given.get("overrides") or ())):
        logger.info("cancelled %s", job)
