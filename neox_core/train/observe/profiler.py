"""torch's profiler on a range of steps, as the configuration asks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from neox_core.config import ProfileConfig

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records the configured steps on the configured ranks and writes a trace, for chrome://tracing or Perfetto.

    Args:
        config: the steps and ranks; None: nothing is recorded.
        folder: where the trace goes.
        rank: this rank.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path, rank: int) -> None:
        self._config = config if config is not None and rank in config.ranks else None
        self._folder, self._rank = folder, rank
        self._profile: Any = None
        self._first = 0

    def begin(self, step: int) -> None:
        """A step begins; also of a training that was resumed within the range."""
        if self._config and self._profile is None and self._config.first_step <= step <= self._config.last_step:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=kinds)
            self._profile.start()
            self._first = step

    def end(self, step: int) -> None:
        """A step has ended; after the last one the trace is written, which waits for the device."""
        if self._profile is None or self._config is None or step < self._config.last_step:
            return
        profile, self._profile, self._config = self._profile, None, None
        profile.stop()
        path = self._folder / f"profile_rank_{self._rank}_steps_{self._first}-{step}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        logger.info("profile of steps %d to %d: %s", self._first, step, path)
