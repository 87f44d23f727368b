"""The report page, parsed as a browser would; and the table at the end of a run."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from neox_core.errors import DataError
from neox_core.train.observe.rows import read_metrics
from tasks.report.figures import SOURCE_COLOURS
from tasks.report.page import ReportData, headline, summary_rows, total_seconds, write_report
from tests.paths import ROOT


def evaluation(step: int, **perplexity: float) -> dict[str, Any]:
    sources = {
        name: {"tokens": 10, "bytes": 30, "loss": 1.0, "perplexity": value, "bits_per_byte": value / 100}
        for name, value in perplexity.items()
    }
    return {"step": step, "sources": sources}


def counts(tokens: int) -> dict[str, int]:
    return {"documents": 12, "bytes": 3 * tokens, "tokens": tokens}


DATA = ReportData(
    title="toy <run>",
    config={"name": "toy", "note": "<script>alert(1)</script>", "train": {"global_batch_tokens": 4096, "steps": 4}},
    ledger={
        "sources": {
            "arxiv": {"train": counts(50_000), "validation": counts(777)},
            "code": {"train": counts(20_000)},
        },
        "run": {
            "arxiv": {"share": 0.75, "sequences": 12, "tokens": 3072, "epochs": 0.0614},
            "code": {"share": 0.25, "sequences": 4, "tokens": 1024, "epochs": 0.0512},
        },
    },
    metrics=[
        {"step": 0, "validation/loss": 7.5},
        {"step": 1, "train/loss": 7.25, "train/lr": 1e-3, "train/gradient_norm": 2.0, "train/tokens_per_second": 900.0},
        {
            "step": 2,
            "train/loss": 6.125,
            "train/lr": 2e-3,
            "train/gradient_norm": 1.0,
            "train/tokens_per_second": 950.0,
        },
    ],
    evaluations=[evaluation(2, arxiv=50.0, code=210.0), evaluation(0, arxiv=100.0, code=200.0)],
    stages=[
        {"stage": "prepare-data", "seconds": 0.25, "skipped": True},
        {"stage": "train", "seconds": 300.0, "skipped": False},
    ],
    train={
        "first_loss": 7.25,
        "last_loss": 6.125,
        "steps": 2,
        "tokens_per_second": 925.4,
        "mfu": 0.314,
        "checkpoints": [0, 2],
        "prefix": "s3://b/toy",
    },
    links={"model": "/runs/toy/hf", "W&B": "https://wandb.ai/x?a=1&b=2"},
    software={"torch": "2.13.0", "llemma-pretrain": "0.1.0"},
)


_SLOW_PANDAS = """
import sys, time
sys.modules["__main__"].begun.set()
time.sleep(2)
class Series: pass
class Index: pass
class DataFrame: pass
"""
_TWO_THREADS = """
import sys, threading
from pathlib import Path
from tasks.report.page import write_report
from tests.tasks.report.test_page import DATA
begun = threading.Event()
thread = threading.Thread(target=__import__, args=("pandas",))
thread.start()
begun.wait()
write_report(Path(sys.argv[1]), DATA)
"""


def test_another_thread_is_importing_pandas(tmp_path: Path) -> None:
    """W&B imports it with the first table of scores, while a chain's training renews the report."""
    (tmp_path / "pandas.py").write_text(_SLOW_PANDAS)
    path = tmp_path / "report.html"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run([sys.executable, "-c", _TWO_THREADS, str(path)], env=environment, check=True)
    assert path.is_file()


def test_a_pandas_that_cannot_be_imported_is_none(tmp_path: Path) -> None:
    """One that was built for another numpy raises ValueError."""
    (tmp_path / "pandas.py").write_text("raise ValueError('numpy.dtype size changed')")
    script = _TWO_THREADS.partition("begun =")[0] + "write_report(Path(sys.argv[1]), DATA)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "report.html")], env=environment, check=True)


class Page(HTMLParser):
    """Collects text, tags with attributes, and the bodies of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not self._open or self._open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def figure(self, chart: str) -> list[dict[str, Any]]:
        """The traces that a chart's script hands to plotly."""
        script = next(s for s in self.scripts if f'"chart-{chart}"' in s and "newPlot" in s)
        start = script.index("[", script.index(f'"chart-{chart}"', script.index("newPlot")))
        traces: list[dict[str, Any]] = json.JSONDecoder().raw_decode(script[start:])[0]
        return traces


def render(path: Path, data: ReportData) -> Page:
    write_report(path / "report.html", data)
    page = Page((path / "report.html").read_text(encoding="utf-8"))
    assert page._open == []
    return page


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = render(tmp_path, DATA)
    assert not [tag for tag, attributes in page.tags if "src" in attributes or tag in ("link", "iframe", "img")]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["file:///runs/toy/hf", "https://wandb.ai/x?a=1&b=2"]
    libraries = [script for script in page.scripts if len(script) > 1_000_000]
    assert len(libraries) == 1


def test_text_is_escaped(tmp_path: Path) -> None:
    page = render(tmp_path, DATA)
    assert "toy <run>" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert not any(script.strip().startswith("alert") for script in page.scripts)


def test_a_source_name_cannot_break_out_of_a_chart(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>"
    sources = {name: {"perplexity": 2.0, "bits_per_byte": 1.0}}
    page = render(tmp_path, ReportData("x", evaluations=[{"step": 0, "sources": sources}]))
    assert not any(script.strip() == "alert(1)" for script in page.scripts)
    assert page.figure("perplexity")[0]["name"] == name


def test_curves_show_the_metrics(tmp_path: Path) -> None:
    page = render(tmp_path, DATA)
    training, validation = page.figure("loss")
    assert (training["x"], training["y"]) == ([1, 2], [7.25, 6.125])
    assert (validation["x"], validation["y"]) == ([0], [7.5])
    assert page.figure("train-lr")[0]["y"] == [1e-3, 2e-3]
    assert page.figure("train-gradient_norm")[0]["y"] == [2.0, 1.0]
    assert page.figure("train-tokens_per_second")[0]["y"] == [900.0, 950.0]


def test_each_source_has_one_colour_everywhere(tmp_path: Path) -> None:
    page = render(tmp_path, DATA)
    perplexity = {trace["name"]: trace for trace in page.figure("perplexity")}
    assert (perplexity["code"]["x"], perplexity["code"]["y"]) == ([0, 2], [200.0, 210.0])
    expected = dict(zip(("arxiv", "code"), SOURCE_COLOURS, strict=False))
    for chart in ("perplexity", "bits-per-byte"):
        assert {trace["name"]: trace["line"]["color"] for trace in page.figure(chart)} == expected
    shares = page.figure("mixture")[0]
    assert dict(zip(shares["y"], shares["marker"]["color"], strict=True)) == expected
    assert dict(zip(shares["y"], shares["x"], strict=True)) == {"arxiv": 75.0, "code": 25.0}
    dots = [str(attributes["style"]) for _, attributes in page.tags if attributes.get("class") == "dot"]
    assert [re.findall("#[0-9a-f]{6}", style) for style in dots] == [[colour] for colour in expected.values()]


def test_telemetry_is_shown(tmp_path: Path) -> None:
    names = ("embedding", "blocks_00-01", "head")
    phases = {"time/forward_backward": 0.5, "time/optimizer": 0.1, "time/data_wait": 0.02, "time/step": 0.6}
    rows = [
        {"step": step, "train/mfu": 0.4, "memory/allocated_gib": 70.0, "loss/arxiv": 3.0 / step, "loss/new": 2.0}
        | {f"gradient_norm/{name}": float(step + index) for index, name in enumerate(names)}
        | phases
        for step in (1, 2)
    ]
    page = render(tmp_path, replace(DATA, metrics=rows))
    losses = {trace["name"]: trace for trace in page.figure("source-loss")}
    assert losses.keys() == {"arxiv", "new"}
    assert (losses["arxiv"]["x"], losses["arxiv"]["y"]) == ([1, 2], [3.0, 1.5])
    assert losses["arxiv"]["line"]["color"] == SOURCE_COLOURS[0]
    norms = page.figure("gradient-norms")
    assert [(trace["name"], trace["y"]) for trace in norms] == [
        ("embedding", [1.0, 2.0]),
        ("blocks 00-01", [2.0, 3.0]),
        ("head", [3.0, 4.0]),
    ]
    assert len({trace["line"]["color"] for trace in norms}) == 3
    times = page.figure("time")
    assert [trace["name"] for trace in times] == [
        "forward and backward",
        "optimizer",
        "wait for data (longest of all ranks)",
    ]
    assert [trace.get("stackgroup") for trace in times] == ["all", "all", None]
    assert page.figure("train-mfu")[0]["y"] == [0.4, 0.4]
    assert page.figure("memory-allocated_gib")[0]["y"] == [70.0, 70.0]
    assert not page_has_chart(page, "memory-resident_gib")


def test_ledger_stages_and_links_are_shown(tmp_path: Path) -> None:
    text = render(tmp_path, DATA).text
    assert "arxiv 12 150 kB 50,000 3.00 777 75.0% 3,072 0.0614" in text
    assert "code 12 60 kB 20,000 3.00 – 25.0% 1,024 0.0512" in text
    assert "prepare-data 0.2 s, skipped train 5.0 min in all 5.0 min" in text
    assert "model /runs/toy/hf" in text
    assert "torch 2.13.0" in text


def test_what_was_consumed_and_changes_of_weights_are_shown(tmp_path: Path) -> None:
    def use(sequences: int) -> dict[str, float]:
        return {"sequences": sequences, "tokens": 256 * sequences, "epochs": sequences / 8}

    history = [
        {"step": 1, "sources": {"arxiv": use(6), "code": use(2)}},
        {"step": 2, "sources": {"arxiv": use(6), "code": use(10)}},
    ]
    changes = [{"from_step": 2, "shares": {"arxiv": 0.0, "code": 1.0}}]
    data = replace(DATA, train={**DATA.train, "consumed": history}, ledger={**DATA.ledger, "changes": changes})
    page = render(tmp_path, data)
    arxiv, code = page.figure("consumed")
    assert (arxiv["name"], arxiv["x"], arxiv["y"]) == ("arxiv", [0, 1, 2], [0, 1536, 1536])
    assert (code["name"], code["x"], code["y"]) == ("code", [0, 1, 2], [0, 512, 2560])
    assert arxiv["stackgroup"] == code["stackgroup"]
    assert "up to step 2 sequences tokens epochs arxiv 6 1,536 0.75 code 10 2,560 1.25" in page.text
    assert "from step arxiv code 2 0.0% 100.0%" in page.text


def test_incidents_and_changes_of_the_recipe_are_shown(tmp_path: Path) -> None:
    incident = {
        "step": 1234, "problem": "not finite", "action": "rollback", "loss": "nan", "gradient_norm": 1.5,
        "ranks": [3, 7], "sources": {"arxiv": 6, "code": 2},
    }  # fmt: skip
    changes = [{"from_step": 2000, "lr": 5e-05, "global_batch_tokens": None}]
    page = render(tmp_path, replace(DATA, train={**DATA.train, "incidents": [incident], "changes": changes}))
    assert "1,234 not finite rollback nan 1.5 3, 7 arxiv 6 code 2" in page.text
    assert "from step peak learning rate tokens per batch 2,000 5e-05" in page.text


def test_headline_numbers() -> None:
    cards = {what: (value, note) for what, value, note in headline(DATA)}
    assert cards["training loss"] == ("6.125", "from 7.250")
    assert cards["perplexity"] == ("−22%", "lower on 1 of 2 sources")  # half of 100 to 50 and 200 to 210
    assert cards["steps"] == ("2", "4,096 tokens")
    assert cards["checkpoints"] == ("2", "last at step 2")
    assert cards["time"] == ("5.0 min", "1 of 2 stages skipped")


def test_summary_table() -> None:
    assert summary_rows(DATA) == [
        ("tokens: arxiv", "50,000 to train on, 3,072 used (75.0% of the run, 0.0614 epochs)"),
        ("tokens: code", "20,000 to train on, 1,024 used (25.0% of the run, 0.0512 epochs)"),
        ("training loss", "7.250 → 6.125 in 2 steps"),
        ("validation perplexity: arxiv", "100.00 → 50.00"),
        ("validation perplexity: code", "200.00 → 210.00"),
        ("throughput", "925 tokens/s, 31.4% model FLOPs utilisation"),
        ("model", "/runs/toy/hf"),
        ("W&B", "https://wandb.ai/x?a=1&b=2"),
    ]


@pytest.mark.parametrize("part", ["config", "ledger", "train", "links", "software", "metrics", "evaluations", "stages"])
def test_any_part_may_be_missing(part: str, tmp_path: Path) -> None:
    empty: Any = () if part in ("metrics", "evaluations", "stages") else {}
    data = replace(DATA, **{part: empty})
    render(tmp_path, data)
    summary_rows(data)


def test_nothing_is_known_yet(tmp_path: Path) -> None:
    page = render(tmp_path, ReportData("new"))
    assert "No steps are recorded yet." in page.text
    assert "No checkpoint is evaluated yet." in page.text
    assert not [script for script in page.scripts if "lotly" in script]
    assert summary_rows(ReportData("new")) == []


def test_one_evaluation_has_no_before_and_after(tmp_path: Path) -> None:
    data = replace(DATA, evaluations=DATA.evaluations[:1])
    assert [what for what, _ in summary_rows(data) if what.startswith("validation")] == []
    assert page_has_chart(render(tmp_path, data), "perplexity")


def page_has_chart(page: Page, name: str) -> bool:
    return any(attributes.get("id") == f"chart-{name}" for _, attributes in page.tags)


def test_later_lines_win_and_kinds_of_a_step_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "validation/loss": 8.0},
        {"step": 1, "train/loss": 7.0, "train/lr": 1.0},
        {"step": 2, "train/loss": 6.0},
        {"step": 2, "validation/loss": 6.5},
        {"step": 1, "train/loss": 5.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == [
        {"step": 0, "validation/loss": 8.0},
        {"step": 1, "train/loss": 5.0, "train/lr": 1.0},
        {"step": 2, "train/loss": 6.0, "validation/loss": 6.5},
    ]


def test_half_a_last_line_is_passed_over_and_another_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "tra')
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_metrics(path)] == [1]
    assert "last line is incomplete" in caplog.text
    path.write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not a JSON object with a step"):
        read_metrics(path)


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    def with_account(found: int, *others: int) -> dict[str, int]:
        units = ("documents_in", "documents", "rejected", "duplicates", "decontaminated")
        return counts(9) | dict(zip(units, (found, *others), strict=True))

    sources = {
        "arxiv": {"train": with_account(1000, 960, 5, 30, 5), "validation": with_account(20, 19, 1, 0, 0)},
        "code": {"train": with_account(7, 7, 0, 0, 0)},
    }
    text = render(tmp_path, replace(DATA, ledger={"sources": sources})).text
    assert "in = out + all that was left out" in text
    assert "arxiv 1,020 979 6 0 30 0 0 5 code 7 7 0 0 0 0 0 0 all 1,027 986 6 0 30 0 0 5" in text
    assert "in = out" not in render(tmp_path, DATA).text
    sources["code"]["train"] = with_account(8, 7, 0, 0, 0)
    with pytest.raises(DataError, match="'code': 8 records came in, 7 are accounted for"):
        render(tmp_path, replace(DATA, ledger={"sources": sources}))


def test_time_in_which_stages_ran_together_counts_once() -> None:
    stages = [
        {"stage": "convert", "seconds": 10.0, "ended": 100.0},
        {"stage": "train", "seconds": 300.0, "ended": 500.0},
        {"stage": "evaluate", "seconds": 310.0, "ended": 520.0},
        {"stage": "export", "seconds": 5.0, "ended": 600.0},
    ]
    assert total_seconds(stages) == 10 + 320 + 5
    assert total_seconds([{"stage": "train", "seconds": 300.0}, {"stage": "export", "seconds": 5.0}]) == 305


def test_what_lies_somewhere_is_a_link_to_it(tmp_path: Path) -> None:
    links = {"model": "/runs/toy/hf", "checkpoints": "s3://bucket/toy", "note": "none"}
    addresses = {"checkpoints": "http://127.0.0.1:9000/bucket/toy"}
    page = render(tmp_path, ReportData("x", links=links, addresses=addresses))
    found = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert found == ["file:///runs/toy/hf", "http://127.0.0.1:9000/bucket/toy"]
    assert "s3://bucket/toy" in page.text
