"""What cannot be finished is refused, or warned of, before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from neox_core.config import EvaluateConfig, EvaluationTask, GenerationConfig, RunConfig
from neox_core.data.tokenization.readers import InputFile
from neox_core.errors import ConfigError, DataError, LaunchError
from tasks.jobs.executor import Resources
from tasks.jobs.slurm.executor import SlurmExecutor
from tasks.preflight import check_run, check_workdir, note_tokenizer
from tasks.tokenization.estimate import check_repeats, estimated_tokens
from tests.neox_core.data.tokenization.test_tokenizer import train_model
from tests.paths import ROOT
from tests.tasks.jobs.slurm.fake_slurm import FakeSlurm
from tests.tasks.tokenization.test_tokenize import FILES, small, small_input


def test_a_workdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("mine")
    for place in (tmp_path / "a file", tmp_path / "a file" / "run", tmp_path / ("n" * 300), Path("/proc/none/run")):
        with pytest.raises(ConfigError, match=r"cannot be written: .*: set workdir to a folder"):
            check_workdir(place)
    assert (tmp_path / "a file").read_text() == "mine"


def with_train(config: RunConfig, **train: object) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def test_a_warmup_longer_than_the_run(tmp_path: Path) -> None:
    config = small(tmp_path)
    schedule = config.train.schedule.model_copy(update={"warmup_steps": config.train.steps + 1})
    with pytest.raises(ConfigError, match=r"warmup_steps \d+ is more than train.steps \d+"):
        check_run(with_train(config, schedule=schedule), ["train"])


def test_a_set_of_which_no_item_fits(tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "How many?", "solution": "one more " * 5_000}) + "\n")
    config = small(tmp_path)
    tasks = {"sums": EvaluationTask(items=tmp_path / "long.jsonl")}
    config = config.model_copy(update={"evaluate": EvaluateConfig(tasks=tasks)})
    with pytest.raises(
        DataError, match=r"tasks.sums: all 1 items are longer than train.sequence_length \d+; the short"
    ):
        check_run(config, ["train", "evaluate"])


def test_answers_that_no_export_could_write(tmp_path: Path) -> None:
    """A job on a GPU would find it out, beside the training."""
    config = small(small_input(tmp_path / "in", FILES))
    generate = GenerationConfig(every=1, tasks=("gsm8k_cot",), data=ROOT / "data/eval", max_tokens=255)
    config = config.model_copy(update={"evaluate": EvaluateConfig(generate=generate)})
    check_run(config, ["evaluate", "prepare-data", "convert"])
    longer = EvaluateConfig(generate=generate.model_copy(update={"max_tokens": 256}))
    with pytest.raises(ConfigError, match=r"max_tokens 256 leaves no room for a prompt in the 256 positions"):
        check_run(config.model_copy(update={"evaluate": longer}), ["evaluate"])
    odd = config.tokenizer.model_copy(update={"model": train_model(tmp_path)})
    with pytest.raises(ConfigError, match=r"evaluate\.generate: tokenizer .* normalizes text .* cannot read it"):
        check_run(config.model_copy(update={"tokenizer": odd}), ["evaluate"])


def test_a_source_that_is_too_small_is_named_by_its_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = with_train(small(tmp_path), steps=10**6)
    sizes = dict.fromkeys(config.data.sources, 10**12)
    files = [InputFile(name, "train", "a.jsonl", f"/in/{name}", size) for name, size in sizes.items()]
    check_repeats(files, config)
    assert not caplog.records
    poor = files[0].source
    check_repeats([InputFile(poor, "train", "a.jsonl.zst", "/in/a", 30), *files[1:]], config)
    (message,) = caplog.messages
    assert f"source '{poor}' holds about 35 tokens" in message
    assert "lower its weight or train.steps" in message
    assert estimated_tokens([], "none") == 1
    with pytest.raises(ConfigError, match=rf"'{poor}': its files hold 3,000 bytes, .* raise data.max_epochs"):
        check_repeats([InputFile(poor, "train", "a.jsonl", "/in/a", 3000), *files[1:]], config)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"text": "tiny"}\n',
            "its train files hold 17 bytes, fewer than the tokens of one sequence, 256 .*: add text",
        ),
        ('{"text": " "}\n' * 100, r"has no text: none of the records of its 1 train files holds any \(1,400 bytes\)"),
        ('{"body": "x"}\n' * 100, r"has no text: .* correct data\.text_key or the files"),
    ],
)
def test_a_source_without_text_is_not_repeated_too_often(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    config = with_train(small(tmp_path), steps=10**6)
    with pytest.raises(DataError, match=f"source 'a':? {reason}"):
        check_repeats([InputFile("a", "train", path.name, str(path), len(content))], config)


def test_a_tokenizer_that_export_gives_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    note_tokenizer(small(tmp_path).tokenizer.model, "llama")
    assert not caplog.records
    note_tokenizer(small(tmp_path).tokenizer.model, "qwen2")
    note_tokenizer(train_model(tmp_path), "llama")
    of_family, message = caplog.messages
    assert "every tokenizer of the family qwen2 as byte-level, so no equal tokenizer.json can be written" in of_family
    assert "normalizes text (nmt_nfkc, remove_extra_whitespaces), so no equal tokenizer.json can be written" in message


def test_a_partition_that_the_cluster_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    SlurmExecutor().check(Resources(partition="long"))
    slurm.refuse("sbatch: error: invalid partition specified: lnog")
    with pytest.raises(LaunchError, match=r"no job with --partition=lnog --account=a: .*invalid partition"):
        SlurmExecutor().check(Resources(partition="lnog", account="a"))
    SlurmExecutor().check(Resources())
    slurm.refuse("allocation failure: Requested nodes are busy")
    SlurmExecutor().check(Resources(partition="long"))
