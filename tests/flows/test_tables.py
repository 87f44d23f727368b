"""What a conversion's and an evaluation's table says."""

from __future__ import annotations

from dataclasses import replace

from flows.tables import checkpoint_rows, perplexity_table
from neox_core.artifact import Artifact, FileRecord
from tasks.identity.stage import StageResult
from tests.neox_core.train.small_training import CONFIG

SUMMARY = {
    "files": 2,
    "bytes": 13_476_839_424,
    "write_seconds": 16.5,
    "bytes_per_second": 816_778_146,
    "largest_layer_difference": 3e-7,
    "layer_tolerance": 1e-5,
    "layer_differences": {f"layer {n} mlp": n * 1e-8 for n in range(31)},
}


def test_sizes_rates_and_differences() -> None:
    record = FileRecord("global_step0/mp_rank_00_model_states.pt", 6_738_419_712, "ab" * 32)
    artifact = Artifact("convert", "f", {}, {}, (record,), SUMMARY)
    rows = dict(checkpoint_rows(artifact))
    assert rows["weights"] == "13,476,839,424 bytes in 2 files"
    assert rows["written"] == "at 817 MB/s, in 16.5 s"
    shown = [name for name in rows if name.startswith("difference in ")]
    assert shown == [f"difference in layer {n} mlp" for n in (30, 29, 28, 27, 26)]
    assert rows[shown[0]] == "3.0e-07 of its largest value; bound 1e-05"
    assert rows["largest layer difference"] == "3e-07"
    assert rows[record.path] == f"6,738,419,712 bytes, SHA-256 {record.sha256}"


def test_nothing_was_left_to_write() -> None:
    summary = {name: value for name, value in SUMMARY.items() if name != "bytes_per_second"}
    artifact = replace(Artifact("export", "f", {}, {}, (), SUMMARY), summary=summary)
    assert dict(checkpoint_rows(artifact))["written"] == "by an earlier attempt"


def test_scores_without_an_interval_and_tasks_without_scores() -> None:
    one = {"items": 1, "metrics": {"bits_per_byte": {"value": 0.5}}, "from_base": {"bits_per_byte": {"value": 0.1}}}
    long = {"items": 0, "left_out": 9, "metrics": {}}
    summary = {"evaluations": [{"step": 5, "sources": {}, "tasks": {"sums": one, "proofs": long}}]}
    result = StageResult(Artifact("evaluate", "f", {}, {}, (), summary), skipped=False)
    sums, proofs = perplexity_table(CONFIG, result)
    assert (sums["value"], sums["against base"]) == ("0.5000", "+0.1000")
    assert (proofs["of"], proofs["value"]) == ("proofs", "all items were left out")


def test_a_score_without_the_items_that_overlap() -> None:
    apart = {"items": 3, "metrics": {"accuracy": {"value": 0.25}}}
    task = {"items": 4, "metrics": {"accuracy": {"value": 0.5}}, "without_overlap": apart}
    summary = {"evaluations": [{"step": 5, "sources": {}, "tasks": {"sums": task}}]}
    whole, others = perplexity_table(CONFIG, StageResult(Artifact("evaluate", "f", {}, {}, (), summary), skipped=False))
    assert (whole["score"], whole["value"]) == ("accuracy", "0.5000")
    assert (others["score"], others["value"]) == ("accuracy, of the 3 items without overlap", "0.2500")
