"""An evaluation of an exported model on the harness's tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neox_core.evaluation.answers.judge import Judge
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from tasks.evaluation.harness.catalogue import TASKS, HarnessTask, write_task_files
from tasks.evaluation.harness.model import go_offline, load_model
from tasks.evaluation.harness.responses import answer_all
from tasks.evaluation.harness.settings import HarnessSettings, claim_folder
from tasks.evaluation.harness.verdicts import generated_record, task_scores

RESULTS_FILE = "results.json"
ITEMS_FILE = "items.jsonl"


def evaluate_model(settings: HarnessSettings, progress: Progress) -> dict[str, Any]:
    """Answer and score the tasks' items; of a call that was killed, what is there is used.

    Returns:
        The content of results.json: by task the scores, the number of items and the seconds of this call.

    Raises:
        ConfigError, DataError: see `claim_folder`, `write_task_files` and `load_model`.
    """
    claim_folder(settings)
    go_offline(settings.out / "cache")
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = write_task_files(settings, Path(lm_eval.__file__).parent / "tasks")
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(settings.tasks))["tasks"]
    model, batch = load_model(settings)
    results = _earlier_results(settings.out)
    for place, name in enumerate(settings.tasks):
        started = time.monotonic()

        def report(share: float, text: str, place: int = place, name: str = name) -> None:
            progress((place + share) / len(settings.tasks), f"{name}: {text}")

        records = _Evaluation(settings, name, loaded[name], model, batch, report).records()
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(settings.out / name / ITEMS_FILE, lines)
        results[name] = {
            "items": len(records),
            "seconds": round(time.monotonic() - started, 1),
            "scores": task_scores(records),
        }
        write_atomically(settings.out / RESULTS_FILE, json.dumps(results, indent=1))
    return results


def _earlier_results(out: Path) -> dict[str, Any]:
    path = out / RESULTS_FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


class _Evaluation:
    """One task's."""

    def __init__(
        self, settings: HarnessSettings, name: str, task: Any, model: Any, batch: int, progress: Progress
    ) -> None:
        self._settings, self._name, self._task, self._model, self._progress = settings, name, task, model, progress
        task.build_all_requests(limit=settings.limit)
        self._requests: list[Any] = task.instances
        # Long prompts first, so that memory fails at once; the order is the same in every call.
        order = sorted(range(len(self._requests)), key=lambda number: (-len(self._requests[number].args[0]), number))
        self._batches = [order[first : first + batch] for first in range(0, len(order), batch)]

    def records(self) -> list[dict[str, Any]]:
        """Each item's record, in the file's order."""
        task = TASKS[self._name]
        if not task.generates:
            return self._choices()
        ways = {"greedy": [self._generate("greedy", {"do_sample": False, "temperature": 0.0}, 0)]}
        if self._settings.samples:
            sampled = {"do_sample": True, "temperature": self._settings.temperature}
            ways["samples"] = [
                self._generate(f"sample-{number:03d}", sampled, number)
                for number in range(1, self._settings.samples + 1)
            ]
        with Judge() as judge:
            return [self._generated(number, task, ways, judge) for number in range(len(self._requests))]

    def _generated(
        self, number: int, task: HarnessTask, ways: dict[str, list[dict[int, str]]], judge: Judge
    ) -> dict[str, Any]:
        request = self._requests[number]
        document = request.doc
        texts = {way: [given[number] for given in found] for way, found in ways.items()}
        gold = str(document.get("gold") or document["answer"])
        record = generated_record(document["id"], request.args[0], gold, texts, judge, task.last_number)
        if "gold" in document:  # the others' own comparison is SymPy without bounds
            record["harness"] = self._own_verdicts(request, texts["greedy"][0])
        return record

    def _own_verdicts(self, request: Any, text: str) -> dict[str, float]:
        """The harness's verdict by each of its filters."""
        request.resps = [text]
        for chain in self._task._filters:
            chain.apply([request])
        return {
            name: float(self._task.process_results(request.doc, [filtered])["exact_match"])
            for name, filtered in request.filtered_resps.items()
        }

    def _choices(self) -> list[dict[str, Any]]:
        found = self._ask("likelihoods", self._likelihoods)
        by_item: dict[int, list[int]] = {}
        for number, request in enumerate(self._requests):
            by_item.setdefault(request.doc_id, []).append(number)
        records = []
        for numbers in by_item.values():
            document, likelihoods = self._requests[numbers[0]].doc, [found[number][0] for number in numbers]
            own = self._task.process_results(document, [tuple(found[number]) for number in numbers])
            records.append(
                {
                    "id": document["id"],
                    "prompt": self._requests[numbers[0]].args[0],
                    "choices": document["choices"],
                    "gold": document["answer"],
                    "log_likelihoods": likelihoods,
                    "picked": max(range(len(likelihoods)), key=likelihoods.__getitem__),
                    "harness": {"acc": float(own["acc"])},
                }
            )
        return records

    def _likelihoods(self, numbers: Sequence[int]) -> list[Any]:
        asked = [self._requests[number] for number in numbers]
        return [list(found) for found in self._model.loglikelihood(asked, disable_tqdm=True)]

    def _generate(self, way: str, sampling: dict[str, Any], sample: int) -> dict[int, str]:
        def answer(numbers: Sequence[int]) -> list[str]:
            import torch

            # A seed per batch: what is left after a kill is drawn as it would have been.
            torch.manual_seed((self._settings.seed * 1_000_003 + sample) * 1_000_003 + numbers[0])
            asked = [_with_sampling(self._requests[n], sampling, self._settings.max_tokens) for n in numbers]
            texts: list[str] = self._model.generate_until(asked, disable_tqdm=True)
            return texts

        return self._ask(way, answer)

    def _ask(self, way: str, answer: Any) -> dict[int, Any]:
        started, total = time.monotonic(), len(self._batches)

        def finished(count: int) -> None:
            left = (time.monotonic() - started) / count * (total - count)
            self._progress(count / total, f"{way}, batch {count} of {total}, {left:.0f} s left")

        return answer_all(self._settings.out / self._name / f"{way}.jsonl", self._batches, answer, finished)


def _with_sampling(request: Any, sampling: dict[str, Any], max_tokens: int) -> Any:
    context, arguments = request.args
    kept = {key: value for key, value in arguments.items() if key not in ("do_sample", "temperature", "max_gen_toks")}
    return replace(request, arguments=(context, kept | sampling | {"max_gen_toks": max_tokens}), resps=[])
