"""Verdicts on answers: each item's record, and the scores of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neox_core.evaluation.answers.extract import extract_answer
from neox_core.evaluation.answers.judge import Judge
from neox_core.evaluation.scores import Score, scores, shares


def generated_record(
    identity: str, prompt: str, gold: str, texts: Mapping[str, Sequence[str]], judge: Judge, last_number: bool
) -> dict[str, Any]:
    """What is kept of an item with written answers.

    Args:
        texts: of each way to answer, greedy or samples, what was written.
    """
    record: dict[str, Any] = {"id": identity, "prompt": prompt, "gold": gold}
    for way, written in texts.items():
        answers = [extract_answer(text, last_number) for text in written]
        verdicts = [judge.verdict(gold, answer) for answer in answers]
        record[way] = [
            {"text": text, "answer": answer, "correct": verdict.correct, "reason": verdict.reason}
            for text, answer, verdict in zip(written, answers, verdicts, strict=True)
        ]
        if way != "greedy":
            vote = judge.majority(answers)
            record["majority"] = {"answer": vote, "correct": judge.verdict(gold, vote).correct}
    return record


def task_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """A task's scores, with 95% intervals over items: those of `neox_core.evaluation.scores.scores`, and the share of
    items that the harness's own verdicts call right, as `harness NAME`."""
    own: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.get("harness", {}).items():
            own.setdefault(f"harness {name}", []).append(float(value))
    return scores(records) | {name: shares(values) for name, values in own.items()}
