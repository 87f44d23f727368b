"""Text, tokenizer and base weights may be edited or go once their stages have run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.convert import convert
from flows.llemma_pretrain import llemma_pretrain
from flows.prepare_data import prepare_data
from infra.s3.service import storage_service
from neox_core.artifact import read_artifact
from neox_core.checkpoint.manifest import checkpoint_key, object_key
from neox_core.storage.object_store import ObjectStore
from tasks.identity.training import resolve_training
from tests.e2e.conftest import Chain
from tests.e2e.runs import INTERVAL, STEPS, Run, write_run

pytestmark = pytest.mark.e2e


def test_the_chain_resumes_and_skips_without_its_raw_inputs(chain: Chain, tmp_path: Path) -> None:
    for name in ("text", "base"):
        shutil.copytree(chain.run.path.parent / name, tmp_path / name)
    shutil.copy(chain.run.config.tokenizer.model, tmp_path / "tokenizer.model")
    run = Run(write_run(tmp_path, {"tokenizer": {"model": "tokenizer.model"}}))
    for pattern in ("prepare-data-*", "convert-*", "s3"):
        (source,) = chain.run.workdir.glob(pattern)
        shutil.copytree(source, run.workdir / source.name)
    path = str(run.path)
    with storage_service(run.config.storage, run.workdir) as storage:
        assert prepare_data(path).skipped
        assert convert(path).skipped
        for name in ("text", "base"):
            shutil.rmtree(tmp_path / name)
        (tmp_path / "tokenizer.model").unlink()

        store, prefix = ObjectStore(storage), resolve_training(run.config).prefix
        store.delete([info.key for info in store.list(object_key(prefix, checkpoint_key(STEPS), ""))])
        report = llemma_pretrain(path)
        made = {artifact: artifact.stat().st_mtime_ns for artifact in run.workdir.glob("*/artifact.json")}
        assert llemma_pretrain(path).rows == report.rows
        assert {artifact: artifact.stat().st_mtime_ns for artifact in made} == made

    assert len(made) == 5
    assert report.path.is_file()
    assert read_artifact(run.stage_folder("train")).summary["started_from_step"] == INTERVAL
    for stage in ("prepare-data", "convert", "evaluate", "export"):
        ours, theirs = (read_artifact(other.stage_folder(stage)) for other in (run, chain.run))
        assert (ours.fingerprint, ours.files) == (theirs.fingerprint, theirs.files)
    assert not list(tmp_path.rglob("params.json"))  # nor was the toy's base made again
