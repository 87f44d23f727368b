"""The proof checker's hook, with a command that stands in for a prover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox_core.errors import ConfigError, DataError
from neox_core.progress import silent
from tasks.evaluation.proofs import ProofChecker, check_proofs

STAND_IN = Path(__file__).parent / "stand_in_prover.sh"


def line(name: str, proof: str) -> str:
    header = f"theory {name} imports Main\nbegin\n"
    return json.dumps(
        {"id": f"m/{name}", "name": name, "header": header, "formal_statement": "theorem", "proof": proof}
    )


def test_verdicts(tmp_path: Path) -> None:
    path, out = tmp_path / "proofs.jsonl", tmp_path / "verdicts.jsonl"
    path.write_text("\n".join([line("one", "by simp"), line("two", "by auto"), line("three", "by forever")]))
    found = check_proofs(path, out, ProofChecker(str(STAND_IN), time_limit=5.0), silent)
    assert [(verdict.id, verdict.verdict) for verdict in found] == [
        ("m/one", "accepted"),
        ("m/two", "rejected"),
        ("m/three", "time limit"),
    ]
    assert found[1].output == "Failed to finish proof in two.thy\n"
    assert len(out.read_text().splitlines()) == 3


def test_what_the_command_is_given() -> None:
    found = ProofChecker("cat", 60.0).check("m", "theory_one", "theory theory_one\nend\n")
    assert (found.verdict, found.output) == ("accepted", "theory theory_one\nend\n")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no command that can be run"):
        ProofChecker("no-such-prover --fast", 1.0)
    checker, path = ProofChecker("true", 1.0), tmp_path / "proofs.jsonl"
    with pytest.raises(ConfigError, match="does not exist"):
        check_proofs(path, tmp_path / "out", checker, silent)
    for text, message in (('{"header": ""}', "line 1 is no proof"), (line("../x", ""), "cannot name a theory")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            check_proofs(path, tmp_path / "out", checker, silent)
