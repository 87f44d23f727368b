"""An evaluation of an exported model on the harness's tasks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from neox_core.errors import ConfigError
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from neox_core.storage.claims import try_claim_name
from tasks.harness.catalogue import write_task_files
from tasks.harness.model import go_offline, load_model
from tasks.harness.questions import Questions
from tasks.harness.settings import HarnessSettings, claim_folder
from tasks.harness.verdicts import task_scores

RESULTS_FILE = "results.json"
ITEMS_FILE = "items.jsonl"


def evaluate_model(settings: HarnessSettings, progress: Progress) -> dict[str, Any]:
    """Answer and score the tasks' items; of a call that was killed, what is there is used.

    Returns:
        The content of results.json: by task the scores, the number of items and the seconds of this call.

    Raises:
        ConfigError, DataError: see `claim_folder`, `write_task_files` and `load_model`; or another call is at
            work in the folder.
    """
    claim_folder(settings)
    with try_claim_name(settings.out, "evaluation") as claimed:
        if not claimed:
            raise ConfigError(f"another call is at work in {settings.out}: wait for it, or give another --out")
        return _evaluate(settings, progress)


def _evaluate(settings: HarnessSettings, progress: Progress) -> dict[str, Any]:
    go_offline(settings.out / "cache")
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = write_task_files(settings, Path(lm_eval.__file__).parent / "tasks")
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(settings.tasks))["tasks"]
    model = load_model(settings)
    results = _earlier_results(settings.out)
    for place, name in enumerate(settings.tasks):
        started = time.monotonic()

        def report(share: float, text: str, place: int = place, name: str = name) -> None:
            progress((place + share) / len(settings.tasks), f"{name}: {text}")

        records = Questions(settings, name, loaded[name], model, report).records()
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(settings.out / name / ITEMS_FILE, lines)
        results[name] = {
            "items": sum("left_out" not in record for record in records),
            "left_out": sum("left_out" in record for record in records),
            "seconds": round(time.monotonic() - started, 1),
            "scores": task_scores(records),
        }
        write_atomically(settings.out / RESULTS_FILE, json.dumps(results, indent=1))
    return results


def _earlier_results(out: Path) -> dict[str, Any]:
    path = out / RESULTS_FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
