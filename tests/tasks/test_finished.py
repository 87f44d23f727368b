"""What a stage has made can be had, and had made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.errors import ConfigError, LlemmaError
from neox_core.progress import silent
from neox_core.storage.claims import try_claim_name
from tasks.convert import convert
from tasks.finished import finished_stage, forget_stage
from tasks.identity.specs import CONVERT, STAGES, stages_between
from tests.e2e.runs import Run, copy_text, write_run


def test_a_stage_that_is_forgotten_is_made_again(tmp_path: Path) -> None:
    copy_text(tmp_path)
    config = Run(write_run(tmp_path)).config
    forget_stage(config, None, CONVERT)  # nothing to forget
    made = convert(config, silent)
    assert finished_stage(config, None, CONVERT).artifact == made.artifact
    with try_claim_name(config.workdir, made.artifact.folder.name), pytest.raises(LlemmaError, match="at work on"):
        forget_stage(config, None, CONVERT)
    forget_stage(config, None, CONVERT)
    with pytest.raises(LlemmaError, match="convert has no finished"):
        finished_stage(config, None, CONVERT)
    assert not convert(config, silent).skipped


def test_the_stages_from_one_to_another() -> None:
    assert stages_between("prepare-data", "export") == STAGES
    assert stages_between("train", "evaluate") == ("train", "evaluate")
    with pytest.raises(ConfigError, match="stop_after convert comes before start_at train"):
        stages_between("train", "convert")
