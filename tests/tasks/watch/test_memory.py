from __future__ import annotations

import json
import time
from pathlib import Path

from tasks.watch.memory import Memory


def test_what_was_told_is_known_to_the_next_watcher_for_a_while(tmp_path: Path) -> None:
    Memory.of(tmp_path).note_told("failed 7")
    Memory.of(tmp_path).note_told("failed 8")
    assert list(Memory.of(tmp_path).told) == ["failed 7", "failed 8"]
    content = json.loads((tmp_path / "watch.json").read_text())
    content["told"]["failed 7"] = time.time() - 100 * 86400
    (tmp_path / "watch.json").write_text(json.dumps(content))
    assert list(Memory.of(tmp_path).told) == ["failed 8"]


def test_restarts_count_as_long_as_no_checkpoint_comes(tmp_path: Path) -> None:
    def may_rerun(saved: int, run: str = "a") -> bool:
        return Memory.of(tmp_path).may_rerun(run, saved, 2)

    assert [may_rerun(saved) for saved in (0, 0, 0, 0)] == [True, True, False, False]
    assert may_rerun(0, run="b")
    assert [may_rerun(saved) for saved in (4, 4, 0, 8)] == [True, True, False, True]
