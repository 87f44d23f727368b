"""An evaluation of an exported model on the harness's tasks."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from neox_core.errors import ConfigError, DataError
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from neox_core.storage.claims import try_claim_name
from neox_core.storage.full_disk import room_below
from tasks.harness.catalogue import write_task_files
from tasks.harness.model import go_offline, load_model
from tasks.harness.questions import Questions
from tasks.harness.settings import HarnessSettings, check_folder, check_settings, read_json
from tasks.harness.verdicts import task_scores

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
ITEMS_FILE = "items.jsonl"


def evaluate_model(settings: HarnessSettings, progress: Progress) -> dict[str, Any]:
    """Answer and score the tasks' items; of a call that was killed, what is there is used.

    Returns:
        The content of results.json: by task the scores, the number of items and the seconds of this call.

    Raises:
        ConfigError, DataError, CheckpointError: see `check_settings`, `check_folder`, `write_task_files` and
            `load_model`; or another call is at work in the folder, its disk is full, or no item of any task could be
            scored.
    """
    check_settings(settings)
    with room_below(settings.out), try_claim_name(settings.out, "evaluation") as claimed:
        if not claimed:
            raise ConfigError(f"another call is at work in {settings.out}: wait for it, or give another --out")
        check_folder(settings)
        return _evaluate(settings, progress)


def _evaluate(settings: HarnessSettings, progress: Progress) -> dict[str, Any]:
    go_offline(settings.out / "cache")
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = write_task_files(settings, Path(lm_eval.__file__).parent / "tasks")
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(settings.tasks))["tasks"]
    model = load_model(settings)
    results, nothing = read_results(settings.out), list[str]()
    for place, name in enumerate(settings.tasks):
        started = time.monotonic()

        def report(share: float, text: str, place: int = place, name: str = name) -> None:
            progress((place + share) / len(settings.tasks), f"{name}: {text}")

        records = Questions(settings, name, loaded[name], model, report).records()
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(settings.out / name / ITEMS_FILE, lines)
        left_out = [record for record in records if "left_out" in record]
        if len(left_out) == len(records):
            nothing.append(
                f"task {name}: all {len(records)} items are left out, the first because {left_out[0]['left_out']}: "
                "leave the task out, or give shorter items or another model"
            )
            logger.warning(nothing[-1])
        results[name] = {
            "items": len(records) - len(left_out),
            "left_out": len(left_out),
            "seconds": round(time.monotonic() - started, 1),
            "scores": task_scores(records),
        }
        write_atomically(settings.out / RESULTS_FILE, json.dumps(results, indent=1))
    if len(nothing) == len(settings.tasks):
        raise DataError("; ".join(nothing))
    return results


def read_results(out: Path) -> dict[str, Any]:
    """The content of results.json; nothing where there is none yet.

    Raises:
        ConfigError: it is damaged.
    """
    path = out / RESULTS_FILE
    advice = "remove it and evaluate the tasks again, whose answers are kept"
    return read_json(path, advice) if path.is_file() else {}
