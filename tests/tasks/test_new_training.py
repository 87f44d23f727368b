"""Whoever has changed a setting is told that this begins a training anew."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from neox_core.config import RunConfig
from neox_core.train.ends.saving import SAVED_FILE
from tasks import new_training
from tasks.identity.training import Training
from tasks.new_training import CONFIG_FILE, say_if_new
from tests.tasks.identity.test_specs import changed
from tests.tasks.identity.test_training import config_in, resolved


@pytest.fixture(autouse=True)
def empty_store(monkeypatch: pytest.MonkeyPatch) -> dict[int, object]:
    stored: dict[int, object] = {}
    monkeypatch.setattr(Training, "lineage_checkpoints", lambda self: stored)
    return stored


def begin(config: RunConfig) -> Training:
    training = resolved(config)
    training.scratch.mkdir(parents=True)
    (training.scratch / CONFIG_FILE).write_text(training.config.model_dump_json())
    return training


def said(config: RunConfig, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=new_training.__name__):
        say_if_new(resolved(config))
    return caplog.text


def test_what_differs_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(tmp_path)
    assert said(config, caplog) == "", "there is no other one"
    first = begin(config)
    assert said(config, caplog) == "", "it has begun"
    other = changed(changed(config, "data.eval_sources", ("arxiv",)), "train.optimizer.lr", 1e-5)
    other = changed(changed(other, "data.workers", 7), "train.log_interval", 3)
    text = said(other, caplog)
    assert f"another training than {first.spec.folder.name}" in text
    assert 'data.eval_sources was ["arxiv", "open-web-math", "algebraic-stack"], is ["arxiv"]' in text
    assert "train.optimizer.lr was" in text
    assert "workers" not in text
    assert "log_interval" not in text


def test_checkpoints_that_are_gone_are_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, empty_store: dict[int, object]
) -> None:
    """Another storage.url had a finished training done again, without a word."""
    config = config_in(tmp_path)
    training = begin(config)
    (training.scratch / SAVED_FILE).write_text("20")
    text = said(config, caplog)
    assert f"{training.spec.folder.name} has saved step 20, but {config.storage.url} holds no" in text
    empty_store[10] = None
    assert said(config, caplog) == ""


def test_many_settings_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(tmp_path)
    begin(config)
    for name in ("steps", "sequence_length", "global_batch_tokens", "micro_batch_size"):
        config = changed(config, f"train.{name}", 8192)
    for name in ("lr", "weight_decay"):
        config = changed(config, f"train.optimizer.{name}", 1e-3)
    config = changed(changed(config, "seed", 99), "data.text_key", "body")
    text = said(config, caplog)
    assert text.count(" was ") == 6
    assert "and 1 more" in text


def test_a_text_that_was_edited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(tmp_path)
    scratch = tmp_path / "scratch" / "train-0123456789abcdef"
    scratch.mkdir(parents=True)
    (scratch / CONFIG_FILE).write_text(resolved(config).config.model_dump_json())
    assert "made something else since" in said(config, caplog)


def test_what_the_store_has_is_not_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, empty_store: dict[int, object]
) -> None:
    config = config_in(tmp_path)
    begin(config)
    empty_store[100] = "train-x/global_step100", None
    assert said(changed(config, "seed", 99), caplog) == ""
