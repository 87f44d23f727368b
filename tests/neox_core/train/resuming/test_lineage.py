"""A change of weights goes on from the training before it, and from no step that was trained on another mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox_core.artifact import Artifact
from neox_core.checkpoint.manifest import Manifest, publish_manifest, training_prefix
from neox_core.config import RunConfig, TrainChange, load_config
from neox_core.data.dataset import MixtureDataset, SequenceDataset
from neox_core.data.indexed import IndexedWriter
from neox_core.data.mixture import Mixture
from neox_core.errors import CheckpointError
from neox_core.storage.object_store import ObjectStore
from neox_core.train.identity import training_fingerprint, weights_identity
from neox_core.train.resuming.lineage import Ancestor, ancestors, check_consumed, inherit_records, newest_checkpoint
from tasks.identity.specs import CONVERT, convert_logic
from tasks.identity.stage import StageSpec


def config(*from_steps: int) -> RunConfig:
    base = load_config("configs/toy.yml")
    sources = {name: {"weight": 1} for name in base.data.sources}
    changes = [{"from_step": step, "sources": sources} for step in from_steps]
    content = base.data.model_dump(exclude_none=True) | {"weight_changes": changes}
    return base.model_copy(update={"data": type(base.data).model_validate(content)})


def identity(*from_steps: int) -> str:
    return training_fingerprint(config(*from_steps), "d", "w")


def test_a_training_has_the_same_identity_in_every_layout() -> None:
    """That of its shards for one rank; other models and base weights have others."""

    def shards(config: RunConfig, base: str = "b") -> Artifact:
        spec = StageSpec(CONVERT, config, convert_logic(config), {"consolidated.00.pth": base})
        return Artifact(CONVERT, spec.fingerprint, spec.inputs, config.model_dump(mode="json"), (), {})

    def cut(tensor: int, pipeline: int) -> RunConfig:
        parallel = config().parallel.model_copy(update={"tensor": tensor, "pipeline": pipeline})
        return config().model_copy(update={"parallel": parallel})

    one, four = shards(cut(1, 1)), shards(cut(2, 2))
    assert four.fingerprint != one.fingerprint == weights_identity(one) == weights_identity(four)
    assert weights_identity(shards(cut(2, 2), "c")) != weights_identity(one)
    larger = config().model.model_copy(update={"num_layers": 5})
    assert weights_identity(shards(config().model_copy(update={"model": larger}))) != weights_identity(one)


def test_a_training_that_was_named_after_its_layout_is_taken_up() -> None:
    named = [(config(20), config(20).train.steps), (config(), 19)]
    former = [Ancestor(training_fingerprint(run, "d", "shards"), last) for run, last in named]
    assert ancestors(config(20), "d", "w", "shards") == (Ancestor(identity(), 19), *former)
    assert ancestors(config(20), "d", "w", "w") == (Ancestor(identity(), 19),)


def test_ancestors_are_the_trainings_with_fewer_changes() -> None:
    assert len({identity(), identity(20), identity(20, 50), identity(21)}) == 4
    assert ancestors(config(), "d", "w") == ()
    assert ancestors(config(20, 50), "d", "w") == (Ancestor(identity(20), 49), Ancestor(identity(), 19))


def test_changes_of_the_recipe_are_ancestors_too() -> None:
    """In order of their steps, whatever they change; those from one step are one."""

    def both(weights: tuple[int, ...], recipe: tuple[int, ...]) -> RunConfig:
        base = config(*weights)
        changes = tuple(TrainChange(from_step=step, lr=1e-4) for step in recipe)
        return base.model_copy(update={"train": base.train.model_copy(update={"changes": changes})})

    def name(weights: tuple[int, ...], recipe: tuple[int, ...]) -> str:
        return training_fingerprint(both(weights, recipe), "d", "w")

    assert ancestors(both((20, 50), (30, 50)), "d", "w") == (
        Ancestor(name((20,), (30,)), 49),
        Ancestor(name((20,), ()), 29),
        Ancestor(name((), ()), 19),
    )


def test_shorter_trainings_are_ancestors_where_learning_rates_agree() -> None:
    def lasting(steps: int, *extends: int, changes: tuple[int, ...] = (), **schedule: Any) -> RunConfig:
        base = config()
        recipe = tuple(TrainChange(from_step=step, lr=1e-4) for step in changes)
        values = {"steps": steps, "extends": extends, "changes": recipe}
        values["schedule"] = base.train.schedule.model_copy(update={"warmup_steps": 10} | schedule)
        return base.model_copy(update={"train": base.train.model_copy(update=values)})

    def name(*args: Any, **named: Any) -> str:
        return training_fingerprint(lasting(*args, **named), "d", "w")

    def found(*args: Any, **named: Any) -> tuple[Ancestor, ...]:
        return ancestors(lasting(*args, **named), "d", "w")

    assert name(200, 100) == name(200)
    fixed = {"decay_steps": 500}
    assert found(200, 100, **fixed) == (Ancestor(name(100, **fixed), 100),)
    assert found(200, 100) == (Ancestor(name(100), 10),)  # the cosine ends at `steps`: only the warmup is the same
    written_out = {"decay_steps": 100}
    assert found(200, 100, **written_out) == (Ancestor(name(100, **written_out), 100), Ancestor(name(100), 100))
    by_share = {"kind": "wsd", "decay_share": 0.2}
    assert found(200, 100, **by_share, decay_steps=20)[-1] == Ancestor(name(100, **by_share), 80)
    wsd = {"kind": "wsd", "decay_steps": 19}  # no share of any of these lengths
    assert found(200, 100, **wsd) == (Ancestor(name(100, **wsd), 81),)
    assert found(300, 100, 200, **wsd) == (Ancestor(name(200, **wsd), 181), Ancestor(name(100, **wsd), 81))
    assert found(200, 100, changes=(50, 150), **wsd) == (
        Ancestor(name(200, changes=(50,), **wsd), 149),
        Ancestor(name(100, changes=(50,), **wsd), 81),
        Ancestor(name(200, **wsd), 49),
        Ancestor(name(100, **wsd), 49),
    )


def publish(store: ObjectStore, fingerprint: str, *steps: int) -> None:
    for step in steps:
        manifest = Manifest(step, 16 * step, (), {}, fingerprint, {})
        publish_manifest(store, training_prefix(fingerprint), manifest)


def found(store: ObjectStore, *from_steps: int) -> tuple[str, int] | None:
    newest = newest_checkpoint(store, identity(*from_steps), ancestors(config(*from_steps), "d", "w"))
    return newest and (newest[0], newest[1].step)


def test_newest_checkpoint_before_the_change(store: ObjectStore) -> None:
    assert found(store, 20, 50) is None
    publish(store, identity(), 10, 19, 20, 30)
    assert found(store) == (training_prefix(identity()), 30)
    assert found(store, 20) == (training_prefix(identity()), 19)
    assert found(store, 20, 50) == (training_prefix(identity()), 19)
    assert found(store, 5) is None
    publish(store, identity(20), 25, 50)
    assert found(store, 20, 50) == (training_prefix(identity(20)), 25)
    publish(store, identity(20, 50), 60)
    assert found(store, 20, 50) == (training_prefix(identity(20, 50)), 60)
    # An ancestor that was named after a first start has come further.
    publish(store, identity(90), 5)
    assert found(store, 90) == (training_prefix(identity()), 30)
    assert found(store) == (training_prefix(identity()), 30)


def test_a_mixture_that_was_another_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    sources = {}
    for name in ("a", "b"):
        with IndexedWriter(tmp_path / name, np.dtype("<u2")) as writer:
            writer.add_document(np.arange(100))
        sources[name] = SequenceDataset(tmp_path / name, 10, name)

    def dataset(*changes: Any) -> MixtureDataset:
        return MixtureDataset(Mixture({"a": 1, "b": 1}, changes), sources)

    stored = json.loads(Manifest(1, 40, (), {}, "f", {}, consumed=dataset().consumed(40)).to_json())
    manifest = Manifest.from_json(json.dumps(stored))
    check_consumed(dataset(), manifest)
    check_consumed(dataset((40, {"a": 9, "b": 1})), manifest)
    with pytest.raises(
        CheckpointError,
        match=r"trained on .*'sequences': 20.* of source 'a', but .*weight_changes only.*train.changes cannot change",
    ):
        check_consumed(dataset((36, {"a": 1, "b": 0})), manifest)


def test_metrics_begin_with_the_ancestors_up_to_the_step(store: ObjectStore, tmp_path: Path) -> None:
    store.put_text("old/metrics.jsonl", "".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    inherit_records(store, "new", "old", 3, tmp_path / "new")
    assert not (tmp_path / "new" / "incidents.jsonl").exists()
    path = tmp_path / "new" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    path.write_text("own\n")
    inherit_records(store, "new", "old", 3, tmp_path / "new")
    assert path.read_text() == "own\n"
    path.unlink()
    store.put_text("new/metrics.jsonl", "what began with the old one's\n")
    inherit_records(store, "new", "old", 3, tmp_path / "new")
    assert not path.exists()  # MetricsLog fetches the stored one
