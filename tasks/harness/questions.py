"""One task's requests to the model, and the items' records made of what it answered."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from neox_core.errors import CheckpointError
from neox_core.evaluation.answers.judge import Judge
from neox_core.evaluation.scores import solution_record
from neox_core.progress import Progress
from tasks.harness.catalogue import TASKS, HarnessTask
from tasks.harness.documents import boxed_answer
from tasks.harness.model import fitting_batch
from tasks.harness.responses import Answer, answer_all
from tasks.harness.settings import HarnessSettings
from tasks.harness.verdicts import generated_record

_GREEDY = {"do_sample": False, "temperature": 0.0}
_PLAIN = {"do_sample": True, "top_k": 0, "top_p": 1.0}
"""From the whole distribution, whatever the model's generation_config.json says."""


_SEEDS = 2**63
"""How many torch takes."""


class Questions:
    """A task's, in the same batches in every call."""

    def __init__(self, settings: HarnessSettings, name: str, task: Any, model: Any, progress: Progress) -> None:
        self._settings, self._name, self._task, self._model, self._progress = settings, name, task, model, progress
        self._kind = TASKS[name].kind
        self._through = 0
        task.build_all_requests(limit=settings.limit)
        self._requests: list[Any] = task.instances
        # Long prompts first, so that memory fails at once; the order is the same in every call.
        order = sorted(self._asked(), key=lambda number: (-self._characters(number), number))
        batch = settings.batch_size or fitting_batch(settings, self._tokens(order[:1]), self._kind == "written")
        model.batch_size_per_gpu = batch
        self._batches = [order[first : first + batch] for first in range(0, len(order), batch)]

    def records(self) -> list[dict[str, Any]]:
        """Each item's record, in the file's order."""
        task = TASKS[self._name]
        if task.kind != "written":
            found = self._ask("likelihoods", self._likelihoods)
            return self._choices(found) if task.kind == "choices" else self._solutions(found)
        ways = {"greedy": [self._generate("greedy", _GREEDY, 0)]}
        if self._settings.samples:
            sampled = _PLAIN | {"temperature": self._settings.temperature}
            ways["samples"] = [
                self._generate(f"sample-{number:03d}", sampled, number)
                for number in range(1, self._settings.samples + 1)
            ]
        with Judge() as judge:
            return [self._generated(number, task, ways, judge) for number in range(len(self._requests))]

    def _asked(self) -> list[int]:
        """Numbers of the requests; texts that alone are longer than the model takes have no likelihood."""
        numbers = range(len(self._requests))
        return list(numbers) if self._kind == "written" else [n for n in numbers if self._fits(self._requests[n])]

    def _fits(self, request: Any) -> bool:
        prompt, text = request.args
        length = int(self._model.max_length)
        if len(text.encode()) < length:  # a token has one byte or more, and a first blank may be added
            return True
        return len(self._model._encode_pair(prompt, text)[1]) <= length

    def _characters(self, number: int) -> int:
        return sum(len(text) for text in self._requests[number].args if isinstance(text, str))

    def _tokens(self, numbers: Sequence[int]) -> int:
        """Of the longest request, as the model cuts it."""
        texts = ["".join(text for text in self._requests[n].args if isinstance(text, str)) for n in numbers]
        return min(int(self._model.max_length), max((len(self._model.tok_encode(text)) for text in texts), default=1))

    def _generated(
        self, number: int, task: HarnessTask, ways: dict[str, list[dict[int, str]]], judge: Judge
    ) -> dict[str, Any]:
        request = self._requests[number]
        document = request.doc
        texts = {way: [given[number] for given in found] for way, found in ways.items()}
        gold = str(document.get("gold") or boxed_answer(document["solution"]))
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

    def _solutions(self, found: dict[int, Any]) -> list[dict[str, Any]]:
        records = []
        for number, request in enumerate(self._requests):
            prompt, text = request.args
            record = {"id": request.doc["id"], "prompt": prompt, "choices": [text]}
            if number in found:
                records.append(record | solution_record(found[number][0], text))
            else:
                records.append(record | {"left_out": "it is longer than the model takes"})
        return records

    def _choices(self, found: dict[int, Any]) -> list[dict[str, Any]]:
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
        likelihoods = [list(found) for found in self._model.loglikelihood(asked, disable_tqdm=True)]
        for request, (likelihood, _) in zip(asked, likelihoods, strict=True):
            if not math.isfinite(likelihood):
                raise CheckpointError(
                    f"{self._settings.model}: the log-likelihood of item {request.doc['id']} of {self._name} is "
                    f"{likelihood}: the weights are damaged, or --dtype {self._settings.dtype} cannot hold what it "
                    "computes; try --dtype float32, or export the model again"
                )
        return likelihoods

    def _generate(self, way: str, sampling: dict[str, Any], sample: int) -> dict[int, str]:
        def answer(numbers: Sequence[int]) -> list[str]:
            import torch

            # A seed per batch: what is left after a kill is drawn as it would have been.
            seed = ((self._settings.seed * 1_000_003 + sample) * 1_000_003 + numbers[0]) % _SEEDS
            torch.manual_seed(seed)
            # vLLM draws in processes of its own, which are told.
            told = {"seed": seed % 2**31} if self._settings.backend == "vllm" and sample else {}
            asked = [_with_sampling(self._requests[n], sampling | told, self._settings.max_tokens) for n in numbers]
            texts: list[str] = self._model.generate_until(asked, disable_tqdm=True)
            return texts

        return self._ask(way, answer)

    def _ask(self, way: str, answer: Answer) -> dict[int, Any]:
        started, total, before = time.monotonic(), len(self._batches), self._through

        def finished(count: int, asked: int) -> None:
            self._through = before + count
            ways = 1 + self._settings.samples if self._kind == "written" else 1
            share = self._through / (total * ways)
            left = total * ways - self._through
            eta = f", {(time.monotonic() - started) / asked * left:.0f} s left" if asked else ""
            self._progress(share, f"{way}, batch {count} of {total}{eta}")

        return answer_all(self._settings.out / self._name / f"{way}.jsonl", self._batches, answer, finished)


def _with_sampling(request: Any, sampling: dict[str, Any], max_tokens: int) -> Any:
    context, arguments = request.args
    kept = {key: value for key, value in arguments.items() if key not in ("do_sample", "temperature", "max_gen_toks")}
    return replace(request, arguments=(context, kept | sampling | {"max_gen_toks": max_tokens}), resps=[])
