"""Which order of the data a training has: that which it began in, whatever is the newest today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox_core.config import RunConfig, load_config
from neox_core.data.order_version import DATA_ORDER
from neox_core.train.identity import training_fingerprint
from tasks.identity.specs import CONVERT, PREPARE_DATA
from tasks.identity.stage import StageIdentity
from tasks.identity.training import Training, _training

DATA, WEIGHTS = "d" * 64, "w" * 64


def config_in(folder: Path, steps: int = 100, order: int | None = None, **train: Any) -> RunConfig:
    config = load_config("configs/toy.yml")
    data = config.data.model_copy(update={"order": order})
    changed = config.train.model_copy(update={"steps": steps, **train})
    return config.model_copy(update={"workdir": folder, "data": data, "train": changed})


def resolved(config: RunConfig) -> Training:
    data = StageIdentity(PREPARE_DATA, DATA, config.workdir)
    return _training(config, data, StageIdentity(CONVERT, WEIGHTS, config.workdir))


def begin(config: RunConfig) -> None:
    """What a training leaves in its workdir when it is started."""
    fingerprint = training_fingerprint(config, DATA, WEIGHTS)
    (config.workdir / f"train-{fingerprint[:16]}").mkdir(parents=True)


def test_a_new_training_has_the_newest_order(tmp_path: Path) -> None:
    training = resolved(config_in(tmp_path))
    assert training.config.data.order == DATA_ORDER
    assert training.fingerprint == training_fingerprint(config_in(tmp_path), DATA, WEIGHTS)


def test_a_training_ends_in_the_order_that_it_began_in(tmp_path: Path) -> None:
    older = config_in(tmp_path, order=2)
    begin(older)
    training = resolved(config_in(tmp_path))
    assert training.config.data.order == 2
    assert training.fingerprint == training_fingerprint(older, DATA, WEIGHTS)
    assert resolved(config_in(tmp_path, order=DATA_ORDER)).config.data.order == DATA_ORDER  # as it is asked for
    assert resolved(config_in(tmp_path, steps=90)).config.data.order == DATA_ORDER  # another training


@pytest.mark.parametrize("order", [2, DATA_ORDER])
def test_a_longer_training_has_the_order_of_the_one_that_it_extends(tmp_path: Path, order: int) -> None:
    """Their first steps are the same only then."""
    schedule = load_config("configs/toy.yml").train.schedule.model_copy(update={"decay_steps": 500})
    begin(config_in(tmp_path, order=order, schedule=schedule))
    longer = resolved(config_in(tmp_path, steps=200, extends=(100,), schedule=schedule))
    assert longer.config.data.order == order
    assert longer.ancestors[0].fingerprint == training_fingerprint(
        config_in(tmp_path, order=order, schedule=schedule), DATA, WEIGHTS
    )
