"""Predicted steps against measured ones, and what must make them longer or shorter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from neox_core.config import load_config
from neox_core.parallel.overlap.symmetric import groups
from neox_core.planning.exchange_time import additions, copies, late_seconds
from neox_core.planning.hardware import CARDS
from neox_core.planning.step_time import Prediction, predict_run
from tests.neox_core.planning.measured import ROWS, Row, table
from tests.paths import CONFIGS


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_within_a_tenth_of_what_was_measured(row: Row) -> None:
    assert row.predicted().time.total == pytest.approx(row.seconds, rel=0.10)


def test_on_average_within_three_percent() -> None:
    errors = [row.predicted().time.total / row.seconds - 1 for row in ROWS]
    assert abs(sum(errors) / len(errors)) < 0.02, table()
    assert sum(map(abs, errors)) / len(errors) < 0.03, table()


def test_exposed_exchanges_are_those_of_the_profiles() -> None:
    """0.40 to 0.57 s, 0.33 to 0.43 s and 0.19 to 0.25 s on two ranks, and 0.89 s with graphs."""
    found = {
        (row.model, row.micro_batch, row.graphs): row.predicted().time.tensor_exchange
        for row in ROWS
        if row.tensor == 2 and row.data == 1 and row.mode == "none" and (row.layers == 32 or row.model == "34b")
        if row.card == "h200" and not row.overlap and not (row.micro_batch == 4 and row.graphs)
    }
    assert 0.40 <= found["7b", 1, False] <= 0.57
    assert 0.33 <= found["7b", 4, False] <= 0.43
    assert 0.19 <= found["34b", 2, False] <= 0.25
    assert found["7b", 2, True] == pytest.approx(0.89, rel=0.1)


def run(name: str = "llemma_34b", nodes: int | None = None, card: str = "h200", **changes: Any) -> Prediction:
    config = load_config(CONFIGS / f"{name}.yml")
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, field = key.split("__")
        sections.setdefault(section, {})[field] = value
    updated = {section: getattr(config, section).model_copy(update=values) for section, values in sections.items()}
    config = config.model_copy(update=updated)
    return predict_run(config, CARDS[card], nodes)


def test_the_rate_is_that_of_the_step() -> None:
    found = run()
    assert found.tokens_per_second_per_gpu == pytest.approx(4194304 / 256 / found.time.total)
    config = load_config(CONFIGS / "llemma_34b.yml")
    assert found.utilisation(config, CARDS["h200"]) == pytest.approx(found.utilisation(config, CARDS["h100"]))


def test_a_bubble_is_the_other_stages_micro_batch() -> None:
    many, few = (run(parallel__pipeline=4, train__micro_batch_size=size).time for size in (1, 4))
    assert many.bubble < few.bubble < 5 * many.bubble
    assert run().time.bubble == 0.0


def test_weights_gradients_fill_a_bubble() -> None:
    """By twice their time for each other stage: a third of a micro batch's products is theirs."""
    plain, filled = (
        run(parallel__pipeline=4, parallel__pipeline_schedule=schedule, train__activation_checkpointing="none").time
        for schedule in ("1f1b", "zb-h1")
    )
    assert 1 / 3 < filled.bubble / plain.bubble < 0.6
    assert filled.data_exchange > plain.data_exchange, "less of the reduction is hidden"
    parts = ("products", "attention", "elementwise", "pipeline_exchange", "optimizer")
    assert [getattr(filled, part) for part in parts] == [getattr(plain, part) for part in parts]
    assert run(parallel__pipeline_schedule="zb-h1") == run(), "a single stage has none"


def test_few_micro_batches_leave_less_to_fill_a_bubble_with() -> None:
    def spared(count: int) -> float:
        """By 8 data-parallel ranks, with so many micro batches each."""
        layout: dict[str, Any] = {"parallel__pipeline": 4, "train__activation_checkpointing": "none"}
        layout |= {"train__micro_batch_size": 1, "train__global_batch_tokens": count * 8 * 4096}
        plain, filled = (run(**layout, parallel__pipeline_schedule=s).time.bubble for s in ("1f1b", "zb-h1"))
        return plain - filled

    most = spared(16)
    assert [spared(count) / most for count in (1, 2, 3, 4, 5)] == pytest.approx([3 / 6, 4 / 6, 5 / 6, 1, 1])


def test_what_takes_longer() -> None:
    base = run(train__activation_checkpointing="none")
    assert run(train__activation_checkpointing="full").time.recomputation > 3 * base.time.attention / 4
    assert base.time.recomputation == 0.0
    assert run(card="a100-80gb").time.products > 2 * base.time.products
    on_one_node, on_many = (run("llemma_7b", nodes, "a100-80gb").time.data_exchange for nodes in (1, 32))
    assert on_many > 4 * on_one_node, "the network is slower"
    without = run(parallel__sequence=False)
    assert without.time.elementwise > base.time.elementwise


def test_groups_that_lie_on_two_nodes_exchange_over_the_network() -> None:
    whole, cut = (run("llemma_7b", 8, "a100-80gb", parallel__tensor=4, launch__ranks_per_node=n) for n in (8, 6))
    assert cut.time.tensor_exchange > 2.5 * (whole.time.tensor_exchange + whole.hidden)


def test_python_keeps_no_gpu_waiting_with_graphs() -> None:
    slow = next(row for row in ROWS if row.note == "waits for Python")
    assert slow.predicted().time.host > 0.1 * slow.seconds
    assert replace(slow, graphs=True).predicted().time.host == 0.0


def test_what_overlap_leaves_is_that_of_the_profile() -> None:
    """Barriers 0.038 s, copies of own rows 0.051, only NCCL 0.012; what next passes read in addition, 0.01 to 0.03."""
    row = next(row for row in ROWS if row.overlap and row.micro_batch == 8 and "joined" in row.note)
    assert 0.11 <= row.predicted().time.tensor_exchange <= 0.13
    assert copies(row.config(), CARDS["h200"], gathers=512) == pytest.approx(0.051, rel=0.1)


def test_the_backward_pass_and_what_is_gathered_again_are_as_without() -> None:
    """Norms after attention and MLP cost additions of two forward sums; selective gathers again by collectives."""
    row = next(row for row in ROWS if row.overlap and row.micro_batch == 8 and "joined" in row.note)
    changes: list[dict[str, Any]] = [{}, {"family": "olmo2"}, {"mode": "selective"}]
    plain, after, again = (replace(row, **change).predicted() for change in changes)
    forward_sums = 2 * row.layers * 4  # of four micro batches; two tensors more of each
    added = additions(row.config(), CARDS["h200"], 2 * forward_sums, backward=0)
    assert after.time.tensor_exchange - plain.time.tensor_exchange == pytest.approx(added)
    assert again.hidden == pytest.approx(plain.hidden)


def test_sums_of_more_ranks_and_norms_after_them_take_passes_of_their_own() -> None:
    """In a rank's tokens: 1 of two ranks; of four 3 forward and 5 backward; 2 more of forward sums, half of all, whose
    norm comes after."""
    two = next(row for row in ROWS if row.overlap and row.model == "7b").config()
    four, after = (
        two.model_copy(update={"parallel": two.parallel.model_copy(update={"tensor": 4})}),
        two.model_copy(update={"model": two.model.model_copy(update={"family": "olmo2"})}),
    )
    first, *others = (additions(config, CARDS["h200"], 4, backward=2) for config in (two, four, after))
    assert others == pytest.approx([(3 + 5) / 2 * first / 2, 2 * first])


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [8192, 2048, 1500, 512])
@pytest.mark.parametrize("exchange", [0.1, 0.5, 1.0, 3.0])
def test_a_group_of_peers_waits_for_all_of_them(ranks: int, rows: int, exchange: float) -> None:
    """A gather and a sum, played through in the order of symmetric.py; the product takes 1."""
    sizes, copy, own = [len(group) for group in groups(range(1, ranks), rows)], exchange / (ranks - 1), 1 / ranks
    arrived, multiplied = 0.0, own
    for size in sizes:
        arrived += size * copy
        multiplied = max(multiplied, arrived) + size * own
    made, sent = 0.0, 0.0
    for size in sizes:
        made += size * own
        sent = max(sent, made) + size * copy
    assert max(multiplied, sent, 1.0) - 1 == pytest.approx(late_seconds(exchange, 1.0, ranks, rows))


def test_exchanges_beside_products_are_hidden() -> None:
    row = next(row for row in ROWS if row.overlap)
    overlapped, alone = row.predicted(), replace(row, overlap=False).predicted()
    assert overlapped.hidden > 0.7 * alone.time.tensor_exchange
    assert 0.3 < alone.time.total - overlapped.time.total < 0.6, "0.34 s of 5.6 s"
    assert alone.hidden == 0.0
