"""A stage runs once: skipped when finished, resumed or rebuilt when not, one run at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from neox_core.artifact import ARTIFACT_FILE, fingerprint
from neox_core.config import RunConfig, load_config
from neox_core.errors import DataError, LlemmaError
from neox_core.progress import silent
from neox_core.storage import claims
from neox_core.storage.claims import is_claimed, try_claim_name
from tasks.identity.stage import StageSpec, require, run_stage, try_claim
from tests.meanwhile import meanwhile

PATIENCE = 300.0


@pytest.fixture
def spec(tmp_path: Path) -> StageSpec:
    config: RunConfig = load_config("configs/toy.yml").model_copy(update={"workdir": tmp_path / "work"})
    return StageSpec("convert", config, {"layers": 2}, {"base": "0" * 64})


class Build:
    """Writes two files and counts how often it is called."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        """Files that lay in the folder at each call."""

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.found.append(sorted(path.name for path in folder.iterdir()))
        (folder / "a.bin").write_bytes(b"12345")
        (folder / "b.bin").write_bytes(b"678")
        return {"difference": 0.5}


def test_identity_and_place(spec: StageSpec) -> None:
    assert spec.fingerprint == fingerprint("convert", {"layers": 2}, {"base": "0" * 64})
    assert spec.folder == spec.config.workdir / f"convert-{spec.fingerprint[:16]}"


def test_a_finished_stage_is_skipped(spec: StageSpec) -> None:
    build = Build()
    first, second = run_stage(spec, build, silent), run_stage(spec, build, silent)
    assert (first.skipped, second.skipped) == (False, True)
    assert build.found == [[]]
    assert second.artifact == first.artifact
    assert second.seconds == first.seconds >= 0
    assert first.artifact.summary["difference"] == 0.5
    assert first.artifact.inputs == {"base": "0" * 64}
    assert first.artifact.config == spec.config.model_dump(mode="json")
    assert [record.path for record in first.artifact.files] == ["a.bin", "b.bin"]


def test_another_spec_is_another_stage(spec: StageSpec) -> None:
    build = Build()
    run_stage(spec, build, silent)
    other = replace(spec, logical={"layers": 3})
    assert not run_stage(other, build, silent).skipped
    assert run_stage(spec, build, silent).skipped
    assert len(build.found) == 2


def test_what_an_interrupted_call_left_is_there_for_the_next(spec: StageSpec) -> None:
    def interrupted(folder: Path) -> Mapping[str, Any]:
        (folder / "a.bin").write_bytes(b"123")
        raise DataError("line 7 is bad")

    with pytest.raises(DataError, match="line 7 is bad"):
        run_stage(spec, interrupted, silent)
    assert not (spec.folder / ARTIFACT_FILE).exists()
    with pytest.raises(LlemmaError):
        require(spec.identity)
    build = Build()
    assert not run_stage(spec, build, silent).skipped
    assert build.found == [["a.bin"]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a.bin").write_bytes(b"1234"),
        lambda folder: (folder / "b.bin").unlink(),
        lambda folder: (folder / ARTIFACT_FILE).write_text("{"),
        lambda folder: (folder / ARTIFACT_FILE).unlink(),
    ],
    ids=["truncated file", "missing file", "damaged artifact.json", "no artifact.json"],
)
def test_a_damaged_artifact_is_rebuilt(spec: StageSpec, damage: Callable[[Path], object]) -> None:
    build = Build()
    first = run_stage(spec, build, silent)
    damage(spec.folder)
    with pytest.raises(LlemmaError, match=r"intact artifact at .*: run it first, with `llemma run CONFIG convert`"):
        require(spec.identity)
    second = run_stage(spec, build, silent)
    assert not second.skipped
    assert second.artifact.files == first.artifact.files
    assert require(spec.identity) == second.artifact
    assert run_stage(spec, build, silent).skipped


def test_what_lies_elsewhere_can_make_it_run_again(spec: StageSpec) -> None:
    build = Build()
    run_stage(spec, build, silent)
    assert not run_stage(spec, build, silent, still_valid=lambda artifact: False).skipped
    assert run_stage(spec, build, silent, still_valid=lambda artifact: artifact.summary["difference"] == 0.5).skipped


def test_a_second_run_waits_for_the_first_and_does_nothing(spec: StageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_CLAIM_SECONDS", 0.01)
    begun, go_on, waiting = threading.Event(), threading.Event(), threading.Event()
    build, results = Build(), {}

    def slow(folder: Path) -> Mapping[str, Any]:
        begun.set()
        assert go_on.wait(PATIENCE)
        return build(folder)

    def run(name: str, function: Callable[[Path], Mapping[str, Any]], progress: Any) -> None:
        results[name] = run_stage(spec, function, progress)

    def report(share: float, text: str) -> None:
        assert "another run is at work" in text
        waiting.set()

    with meanwhile(partial(run, "first", slow, silent)):
        assert begun.wait(PATIENCE)
        with try_claim(spec) as claimed:
            assert not claimed
        with try_claim(replace(spec, logical={})) as claimed:
            assert claimed  # another stage is not held up
        with meanwhile(partial(run, "second", build, report)):
            assert waiting.wait(PATIENCE)
            go_on.set()
    assert (results["first"].skipped, results["second"].skipped) == (False, True)
    assert len(build.found) == 1


def test_a_failed_run_gives_its_claim_back(spec: StageSpec) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        raise DataError("no")

    with pytest.raises(DataError):
        run_stage(spec, fail, silent)
    with try_claim(spec) as claimed:
        assert claimed


def test_whether_anything_is_at_work(tmp_path: Path) -> None:
    assert not is_claimed(tmp_path, "convert-*")
    with try_claim_name(tmp_path, "convert-0123"):
        assert is_claimed(tmp_path, "convert-*")
        assert not is_claimed(tmp_path, "train-*")
    assert not is_claimed(tmp_path, "convert-*")
