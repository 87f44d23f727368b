"""The whole chain through Prefect, with a real S3 server: what it leaves behind, and that it is done only once."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.artifacts import Artifact
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.convert import convert
from flows.evaluate import evaluate
from flows.export import export
from flows.llemma_pretrain import llemma_pretrain
from flows.prepare_data import prepare_data
from flows.train import train
from infra.s3.service import storage_service
from neox_core.artifact import DigestCache, find_verified, read_artifact
from neox_core.checkpoint.manifest import list_checkpoints
from neox_core.config import RunConfig
from neox_core.data.ledger import run_ledger
from neox_core.storage.object_store import ObjectStore
from neox_core.train.identity import weights_identity
from tasks.identity.training import resolve_training
from tests.e2e.conftest import Chain
from tests.e2e.runs import GLOBAL_BATCH, INTERVAL, SEQUENCE, STEPS, Run

pytestmark = pytest.mark.e2e

STAGES = ("prepare-data", "convert", "train", "evaluate", "export")
SOURCES = {"arxiv", "open-web-math", "algebraic-stack", "pile-sample", "code"}
CHECKPOINTS = [INTERVAL, STEPS]


@pytest.fixture(scope="module")
def store(chain: Chain) -> Iterator[ObjectStore]:
    """The chain's object store; its server runs while this module's tests do."""
    with storage_service(chain.run.config.storage, chain.run.workdir) as storage:
        yield ObjectStore(storage)


def summary(run: Run, stage: str) -> dict[str, Any]:
    return dict(read_artifact(run.stage_folder(stage)).summary)


def prefect_table(stage: str) -> tuple[list[dict[str, Any]], str]:
    """The newest Prefect table of that stage of the small run, and its description."""
    artifact = Artifact.get(f"{stage}-small")
    assert artifact is not None
    assert artifact.type == "table"
    return json.loads(str(artifact.data)), str(artifact.description)


@pytest.mark.parametrize("stage", STAGES)
def test_every_artifact_verifies(chain: Chain, stage: str) -> None:
    folder = chain.run.stage_folder(stage)
    artifact = json.loads((folder / "artifact.json").read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    # What a conversion need not write again, and that it runs: no part of the result.
    files -= {".conversion.json", ".conversion.lock"}
    assert {record["path"] for record in artifact["files"]} == files - {"artifact.json"}
    assert folder.name == f"{stage}-{artifact['fingerprint'][:16]}"
    # a memory of its own: every file is read and hashed again
    assert find_verified(folder, artifact["fingerprint"], DigestCache(folder.parent / "none" / "x")) is not None


def test_artifacts_name_the_ones_they_were_made_from(chain: Chain) -> None:
    made = {stage: read_artifact(chain.run.stage_folder(stage)) for stage in STAGES}
    # A training is the same in every layout, so that it names the weights, not the shards.
    weights = weights_identity(made["convert"])
    assert made["train"].inputs == {"prepare-data": made["prepare-data"].fingerprint, "convert": weights}
    assert made["evaluate"].inputs == {"train": made["train"].fingerprint}
    assert made["export"].inputs["train"] == made["train"].fingerprint


def test_the_ledger_adds_up(chain: Chain, store: ObjectStore) -> None:
    taken = run_ledger(summary(chain.run, "prepare-data")["sources"], chain.run.config)["run"]
    assert set(taken) == SOURCES
    assert sum(use["sequences"] for use in taken.values()) == STEPS * GLOBAL_BATCH
    assert sum(use["tokens"] for use in taken.values()) == STEPS * GLOBAL_BATCH * SEQUENCE
    rows, _ = prefect_table("prepare-data")
    assert {row["source"]: row["share of the run"] for row in rows} == {
        name: f"{use['share']:.1%}" for name, use in taken.items()
    }
    last = list_checkpoints(store, chain.run.stage_folder("train").name)[-1]
    units = ("sequences", "tokens", "epochs")
    consumed = {name: {unit: use[unit] for unit in units} for name, use in taken.items()}
    assert last.consumed == consumed
    history = summary(chain.run, "train")["consumed"]
    assert [entry["step"] for entry in history] == CHECKPOINTS
    assert history[-1]["sources"] == consumed


def test_training_learns_and_logs_every_step(chain: Chain) -> None:
    rows = chain.run.rows()
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.5
    validation = {row["step"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert list(validation) == [0, *CHECKPOINTS]
    assert validation[STEPS] < validation[0] - 0.5
    assert [row["train/sequences_consumed"] for row in rows if "train/loss" in row] == [
        GLOBAL_BATCH * step for step in losses
    ]
    result = summary(chain.run, "train")
    assert (result["started_from_step"], result["steps"], result["checkpoints"]) == (0, STEPS, CHECKPOINTS)
    assert (result["first_loss"], result["last_loss"]) == (losses[1], losses[STEPS])


def test_each_checkpoint_on_s3_has_a_manifest_and_its_files(chain: Chain, store: ObjectStore) -> None:
    prefix = chain.run.stage_folder("train").name
    sizes = {info.key: info.size for info in store.list(f"{prefix}/")}
    for step in CHECKPOINTS:
        text = store.get_text(f"{prefix}/global_step{step}-1/manifest.json")
        manifest = json.loads(text or "null")
        assert manifest["sequences_consumed"] == step * GLOBAL_BATCH
        assert manifest["layout"] == {"tensor": 2, "pipeline": 1, "data": 1}
        listed = {f"{prefix}/global_step{step}-1/{file['path']}": file["size"] for file in manifest["files"]}
        stored = {key: size for key, size in sizes.items() if f"/global_step{step}-1/" in key}
        assert stored == listed | {f"{prefix}/global_step{step}-1/manifest.json": len(text or "")}
    folders = {key.split("/")[1] for key in sizes}
    assert folders == {"metrics.jsonl", "report.html", "lease.json", *(f"global_step{step}-1" for step in CHECKPOINTS)}


def test_the_base_and_each_checkpoint_are_evaluated(chain: Chain) -> None:
    evaluations = summary(chain.run, "evaluate")["evaluations"]
    assert evaluations == json.loads((chain.run.stage_folder("evaluate") / "evaluations.json").read_text())
    assert [evaluation["step"] for evaluation in evaluations] == [0, *CHECKPOINTS]
    for source in chain.run.config.data.validation_sources:
        base, *_, last = [evaluation["sources"][source] for evaluation in evaluations]
        assert base["perplexity"] == pytest.approx(2048, rel=0.2)  # random weights know nothing of 2048 pieces
        assert last["perplexity"] < base["perplexity"] / 1.5
        assert last["bits_per_byte"] < base["bits_per_byte"]


def test_the_export_is_the_last_checkpoint_and_loads_in_transformers(
    chain: Chain, store: ObjectStore, tmp_path: Path
) -> None:
    folder, model = chain.run.stage_folder("export"), chain.run.config.model
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rope = loaded.config.to_dict()["rope_parameters"]
    assert rope["rope_theta"] == model.rope_theta == 10000
    assert (loaded.config.num_key_value_heads, loaded.config.vocab_size) == (2, 2048)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A text that the run has seen the like of: the model does better than chance on it.
    ids = torch.tensor([tokenizer("The proof of the theorem is that the group is a ring. " * 4)["input_ids"]])
    with torch.inference_mode():
        output = loaded(ids, labels=ids)
    assert torch.isfinite(output.logits).all()
    assert float(output.loss) < 7.5  # ln 2048 = 7.62
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    shards = []
    for rank in (0, 1):
        name = f"layer_06-model_{rank:02d}-model_states.pt"
        store.get_file(f"{chain.run.stage_folder('train').name}/global_step{STEPS}-1/{name}", tmp_path / name)
        shards.append(torch.load(tmp_path / name)["final_linear.weight"])
    assert torch.equal(head, torch.cat(shards))


def test_the_report_and_the_offline_wandb_runs_are_there(chain: Chain, store: ObjectStore) -> None:
    page = (chain.run.workdir / "report.html").read_text()
    assert chain.report.path == chain.run.workdir / "report.html"
    assert all(source in page for source in SOURCES)
    assert ("checkpoints", str(summary(chain.run, "train")["prefix"])) in chain.report.rows
    assert store.get_text(f"{chain.run.stage_folder('train').name}/report.html") == page
    wandb = [*chain.run.workdir.glob("scratch/train-*/wandb/offline-run-*/*.wandb")]
    assert len(wandb) == 2  # of the training, and of the evaluation
    assert all(path.stat().st_size > 0 for path in wandb)
    assert [row for row in chain.report.rows if row[0].startswith("W&B: ")] == [
        (f"W&B: {stage}, 1 not uploaded", str(wandb[0].parent.parent)) for stage in ("train", "evaluate")
    ]


def test_perplexities_are_shown_against_the_base_model(chain: Chain) -> None:
    rows, _ = prefect_table("evaluate")
    of_arxiv = [row for row in rows if row["of"] == "arxiv"]
    assert [row["step"] for row in of_arxiv] == ["base", *map(str, CHECKPOINTS)]
    assert of_arxiv[0]["against base"] == "\u2013"
    assert of_arxiv[-1]["against base"].startswith("\u2212")  # less of it
    assert all(len(row["value"]) <= 8 for row in rows)


def test_where_things_lie_and_the_loss_are_on_the_trainings_page(chain: Chain) -> None:
    places, image = Artifact.get("train-places-small"), Artifact.get("train-loss-small")
    assert places is not None
    assert image is not None
    (attempt,) = chain.run.attempts("train")
    assert str(attempt) in str(places.data)
    assert (image.type, str(image.data)[:26]) == ("image", "data:image/svg+xml;base64,")


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_publishes_a_table_and_its_progress(chain: Chain, stage: str) -> None:
    rows, description = prefect_table(stage)
    assert rows
    assert str(chain.run.stage_folder(stage)) in description
    progress = Artifact.get(f"{stage}-progress-small")
    assert progress is not None
    assert (progress.type, float(str(progress.data))) == ("progress", 100.0)


def test_nothing_is_left_running_and_no_downloads_lie_about(chain: Chain) -> None:
    assert chain.left_running == ()
    assert len(chain.run.attempts()) >= 2
    assert chain.run.job_processes()
    assert not any(record.is_alive() for record in chain.run.job_processes())
    downloads = [path for path in chain.run.workdir.glob("scratch/*") if not path.name.startswith("train-")]
    assert not [path for folder in downloads for path in folder.rglob("*") if path.is_file()]


def test_its_jobs_were_slurms(chain: Chain) -> None:
    if chain.slurm is None:
        pytest.skip("SLURM cannot be brought up here, so the jobs were processes: infra/slurm/up says what it needs")
    records = [json.loads(path.read_text()) for path in chain.run.workdir.glob("jobs/*/job.json")]
    assert {record["executor"] for record in records} == {"slurm"}
    environment = os.environ | {"SLURM_CONF": str(chain.slurm / "etc" / "slurm.conf")}
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobName,State"]
    rows = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    states = dict(row.split("|") for row in rows)
    assert {states[record["name"]] for record in records} == {"COMPLETED"}


def test_a_second_run_does_nothing(chain: Chain, store: ObjectStore) -> None:
    config = str(chain.run.path)
    before = {path: path.stat().st_mtime_ns for path in chain.run.workdir.glob("*/artifact.json")}
    attempts = chain.run.attempts()
    report = llemma_pretrain(config)
    assert report.rows == chain.report.rows
    for stage in STAGES:
        assert "was finished before" in prefect_table(stage)[1]
    assert {path: path.stat().st_mtime_ns for path in chain.run.workdir.glob("*/artifact.json")} == before
    assert chain.run.attempts() == attempts


@pytest.mark.parametrize("flow", [prepare_data, convert, train, evaluate, export], ids=lambda flow: flow.name)
def test_each_stage_is_a_flow_of_its_own(chain: Chain, store: ObjectStore, flow: Any) -> None:
    result = flow(str(chain.run.path))
    assert (result.artifact.name, result.skipped) == (flow.name, True)


def test_a_changed_recipe_is_another_training(chain: Chain) -> None:
    """What is made depends on logical values only: another recipe shares the data and the shards."""
    config: RunConfig = chain.run.config
    other = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS + 1})})
    training, changed = resolve_training(config), resolve_training(other)
    assert (changed.data, changed.weights) == (training.data, training.weights)
    assert changed.fingerprint != training.fingerprint
