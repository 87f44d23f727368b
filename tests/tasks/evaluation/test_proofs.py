"""The proof checker's hook, with a command that stands in for a prover."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import pytest

from neox_core.errors import ConfigError, DataError
from neox_core.progress import silent
from tasks.evaluation.proofs import ProofChecker, check_proofs
from tests.waiting import wait_for

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


def test_the_command_runs_where_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STAND_IN.parent)
    for command in (f"./{STAND_IN.name}", f"sh {STAND_IN.name}"):
        assert ProofChecker(command, 60.0).check("m", "one", "by simp").verdict == "accepted"


def test_a_child_that_leaves_the_session_holds_nothing_up() -> None:
    started = time.monotonic()
    command = "sh -c 'setsid sleep 20 & {}' x"
    assert ProofChecker(command.format("exit 0"), 10.0).check("m", "one", "").verdict == "accepted"
    assert ProofChecker(command.format("sleep 20"), 0.5).check("m", "one", "").verdict == "time limit"
    assert time.monotonic() - started < 10


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody has collected it
    except FileNotFoundError:
        return True


def test_children_left_behind_are_ended(tmp_path: Path) -> None:
    command = f"sh -c 'sleep 600 & echo $! > {tmp_path}/pid' x"
    assert ProofChecker(command, 10.0).check("m", "one", "").verdict == "accepted"
    wait_for(lambda: has_ended(int((tmp_path / "pid").read_text())), seconds=10.0)


def test_endless_output_is_not_kept() -> None:
    found = ProofChecker("sh -c 'head -c 50000000 /dev/zero; echo the end; exit 1' x", 60.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdict = found.check("m", "one", "")
    assert (verdict.verdict, verdict.output[-8:], len(verdict.output)) == ("rejected", "the end\n", 2_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_a_command_that_a_signal_ends_gives_no_verdict() -> None:
    for command in ("sh -c 'kill -9 $$'", "sh -c 'sh -c \"kill -9 \\$\\$\"; exit $?'", "sh -c no-such-prover"):
        assert ProofChecker(command, 60.0).check("m", "one", "").verdict == "no verdict"


def test_commands_and_limits_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ProofChecker("sh -c 'exit", 1.0)
    for limit in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises(ConfigError, match="give the seconds for one proof"):
            ProofChecker("true", limit)
    script = tmp_path / "script"
    script.write_text("exit 0\n")
    script.chmod(0o755)
    with pytest.raises(ConfigError, match=r"cannot be run .*script's first line"):
        ProofChecker(str(script), 1.0).check("m", "one", "")


def test_files_of_every_kind(tmp_path: Path) -> None:
    checker, path, out = ProofChecker("true", 10.0), tmp_path / "proofs.jsonl", tmp_path / "out"
    unicode = json.dumps(json.loads(line("two", "a\u2028b")), ensure_ascii=False)
    path.write_bytes(f"\ufeff{line('one', '')}\r\n\r\n{unicode}\r\n".encode())
    assert [verdict.id for verdict in check_proofs(path, out, checker, silent)] == ["m/one", "m/two"]
    for text, message in (
        (b"", "holds no proof"),
        (b'{"id": "\xff"}', "line 1 is not JSON of text"),
        (line("one", "\ud800").encode(), "line 1 is not JSON of text"),
        (line("x" * 300, "").encode(), "cannot name a theory"),
    ):
        path.write_bytes(text)
        with pytest.raises(DataError, match=message):
            check_proofs(path, out, checker, silent)
