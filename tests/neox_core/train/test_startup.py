"""What ranks that differ are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neox_core.artifact import ARTIFACT_FILE
from neox_core.config import RunConfig
from neox_core.train.startup import explain_differences, rank_list, startup_facts
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import CONFIG


def data_folder(folder: Path, fingerprint: str = "f" * 64, size: int = 10) -> Path:
    content = {"name": "prepare-data", "fingerprint": fingerprint, "files": []}
    content |= {key: {} for key in ("inputs", "config", "summary", "software")}
    for source in CONFIG.data.sources:
        (folder / source).mkdir(parents=True)
        (folder / source / "train.bin").write_bytes(b"x" * size)
    (folder / ARTIFACT_FILE).write_text(json.dumps(content))
    return folder


def facts(config: RunConfig, data: Path) -> dict[str, str]:
    return startup_facts(config, "0123", data, data)


def other_config() -> RunConfig:
    changes = {"checkpoint_interval": 7, "optimizer": CONFIG.train.optimizer.model_copy(update={"lr": 0.5})}
    return CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=changes), "workdir": Path("/elsewhere")})


def ask(by_rank: list[list[dict[str, str]]]) -> list[str]:
    """What this rank hears of each of the cases."""
    import torch.distributed as dist

    from neox_core.errors import LaunchError
    from neox_core.train.startup import check_ranks_agree

    dist.init_process_group("gloo")
    heard = []
    for case in by_rank[dist.get_rank()]:
        try:
            check_ranks_agree(case)
            heard.append("")
        except LaunchError as error:
            heard.append(str(error))
    dist.destroy_process_group()
    return heard


def test_all_ranks_hear_who_differs_in_what(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data")
    copied, stale = data_folder(tmp_path / "copy"), data_folder(tmp_path / "stale", "e" * 64, size=8)
    same = facts(CONFIG, data)
    places = CONFIG.model_copy(update={"workdir": Path("/elsewhere")})
    others = [facts(places, copied), facts(other_config(), data), facts(CONFIG, stale), same | {"source code": "new"}]
    first, second = run_ranks(ask, 2, [[same] * len(others), others])
    assert first == second
    assert first[0] == ""
    assert first[1].startswith(
        "the ranks differ: setting train.checkpoint_interval is 25 on rank 0 and 7 on rank 1; "
        "setting train.optimizer.lr is 0.002 on rank 0 and 0.5 on rank 1. Start all"
    )
    assert f"data is {'f' * 64} on rank 0 and {'e' * 64} on rank 1" in first[2]
    assert "size of arxiv's tokens is 10 bytes on rank 0 and 8 bytes on rank 1" in first[2]
    assert f"source code is {same['source code']} on rank 0 and new on rank 1" in first[3]


def test_a_long_list_is_cut() -> None:
    many = [{f"fact {n}": value for n in range(12)} for value in "ab"]
    assert explain_differences(many).count(" on rank 0 and ") == 8
    assert "; and 4 more. Start" in explain_differences(many)
    assert "x is absent on ranks 0, 2 and 1 on rank 1" in explain_differences([{}, {"x": "1"}, {}])


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2, 3], "ranks 0, 2-3")]
)
def test_rank_list(ranks: list[int], text: str) -> None:
    assert rank_list(ranks) == text


def test_every_setting_counts_but_places(tmp_path: Path) -> None:
    found: dict[str, Any] = facts(CONFIG, tmp_path)
    assert found["setting train.micro_batch_size"] == "8"
    assert found["setting data.sources.arxiv.weight"] == "2.0"
    assert found["data"] == "no artifact"
    assert found["size of arxiv's tokens"] == "absent"
    assert not [value for value in found.values() if str(Path.cwd()) in value or "/runs/" in value]
