"""The likelihood of evaluation sets' gold texts under one checkpoint's layers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from neox_core.config import EvaluationTask, RunConfig
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.evaluation.items import Item, asked_texts, load_item_set
from neox_core.evaluation.likelihood import Request, encode_request, log_likelihoods
from neox_core.evaluation.scores import choices_record, scores, solution_record
from neox_core.parallel.ranks.mesh import Mesh

logger = logging.getLogger(__name__)


def score_tasks(config: RunConfig, layers: nn.Sequential, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Score every set of `evaluate.tasks`. Collective over the tensor-parallel ranks.

    Returns:
        By name the metrics, how many items count, were left out, and have a prompt that was cut, the number of tokens
        and seconds that it took, and the items' records.

    Raises:
        ConfigError, DataError: a set cannot be read.
    """
    if not config.evaluate.tasks:
        return {}
    tokenizer = Tokenizer(config.tokenizer)
    return {name: _score(config, name, task, tokenizer, layers, mesh) for name, task in config.evaluate.tasks.items()}


def _score(
    config: RunConfig, name: str, task: EvaluationTask, tokenizer: Tokenizer, layers: nn.Sequential, mesh: Mesh
) -> dict[str, Any]:
    started, length = time.monotonic(), config.train.sequence_length
    item_set = load_item_set(name, task)
    asked = [asked_texts(item, task, item_set) for item in item_set.items]
    requests = [[encode_request(tokenizer, *pair, length) for pair in pairs] for pairs in asked]
    kept = [number for number, found in enumerate(requests) if None not in found]
    flat = [request for number in kept for request in requests[number] if request is not None]
    unique = list(dict.fromkeys(flat))  # what follows no question is the same for many items
    batch = config.evaluate.micro_batch_size * length
    known = dict(zip(unique, log_likelihoods(layers, unique, length, batch, mesh), strict=True))
    likelihoods = iter([known[request] for request in flat])
    records = [
        _record(item, task, [next(likelihoods) for _ in found] if None not in found else None)
        for item, found in zip(item_set.items, requests, strict=True)
    ]
    left_out = sum("left_out" in record for record in records)
    first = (requests[number][0] for number in kept)
    cut = sum(request is not None and request.ids[0] != tokenizer.start_id for request in first)
    result = {
        "items": len(records) - left_out,
        "left_out": left_out,
        "cut": cut,
        "tokens": _tokens(unique),
        "seconds": round(time.monotonic() - started, 3),
        "metrics": scores(records),
        "records": records,
    }
    logger.info("%s: %s over %d items", name, result["metrics"], result["items"])
    if cut:
        logger.warning(
            "%s: %d prompts are longer than train.sequence_length %d and lose their beginning", name, cut, length
        )
    if left_out == len(records):  # the other sets' scores are worth having
        logger.warning("%s has no scores: all items are left out, the first: %s", name, records[0]["left_out"])
    return result


def _record(item: Item, task: EvaluationTask, likelihoods: list[float] | None) -> dict[str, Any]:
    kept: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "choices": item.choices}
    if likelihoods is None:
        return kept | {"left_out": "it is longer than train.sequence_length"}
    if not all(math.isfinite(likelihood) for likelihood in likelihoods):
        return kept | {"left_out": "its likelihood is not a number"}
    if task.kind == "solution":
        return kept | solution_record(likelihoods[0], item.choices[0])
    count = len(item.choices)
    return kept | choices_record(likelihoods[:count], likelihoods[count:], item.gold)


def _tokens(requests: Sequence[Request]) -> int:
    return sum(len(request.ids) - 1 for request in requests)
