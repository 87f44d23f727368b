"""The proof checker's hook, with a command that stands in for a prover."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from neox_core.errors import ConfigError, DataError
from neox_core.progress import silent
from neox_core.storage.claims import try_claim_name
from tasks.evaluation import proofs
from tasks.evaluation.proofs import ProofChecker, check_proofs
from tests.processes import is_running
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


@pytest.mark.parametrize(
    ("child", "end", "limit", "verdict"),
    [
        ("sleep 600", "exit 0", 60.0, "accepted"),
        ("yes", "exit 0", 60.0, "accepted"),
        ("sleep 600", "sleep 600", 5.0, "time limit"),
    ],
)
def test_a_child_that_leaves_the_session_holds_nothing_up(
    tmp_path: Path, child: str, end: str, limit: float, verdict: str
) -> None:
    """Nor does one that goes on writing."""
    leaves = f"setsid sh -c 'echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec {child}' &"
    script = tmp_path / "prover.sh"
    script.write_text(f"{leaves}\nwhile [ ! -e {tmp_path}/pid ]; do sleep 0.05; done\n{end}\n")
    assert ProofChecker(f"sh {script}", limit).check("m", "one", "").verdict == verdict
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid) or child == "yes"  # that one may end because nobody reads any more
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_all_that_a_command_wrote_before_it_ended_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what it left behind holds the pipe, and the thread that reads comes late."""
    run = proofs._Tail.run

    def late(tail: proofs._Tail) -> None:
        assert tail._ended.wait(300)
        run(tail)

    monkeypatch.setattr(proofs._Tail, "run", late)
    found = ProofChecker("sh -c 'setsid sleep 30 & echo the reason; exit 1' x", 60.0).check("m", "one", "")
    assert (found.verdict, found.output) == ("rejected", "the reason\n")


def test_children_left_behind_are_ended(tmp_path: Path) -> None:
    command = f"sh -c 'sleep 600 & echo $! > {tmp_path}/pid' x"
    assert ProofChecker(command, 60.0).check("m", "one", "").verdict == "accepted"
    wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())), seconds=60.0)


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


def test_a_killed_check_goes_on(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(share: float, text: str) -> None:
        if text == "2 of 3":
            raise KilledError

    path, out, asked = tmp_path / "proofs.jsonl", tmp_path / "verdicts.jsonl", tmp_path / "asked"
    path.write_text("\n".join(line(name, "by simp") for name in ("one", "two", "three")))
    script = tmp_path / "prover.sh"
    script.write_text(f'echo "$1" >> {asked}\ncase $1 in *one.thy) test -e {tmp_path}/mended || exit 127;; esac\n')
    checker = ProofChecker(f"sh {script}", 10.0)
    with pytest.raises(KilledError):
        check_proofs(path, out, checker, kill)
    (tmp_path / "mended").touch()
    found = check_proofs(path, out, checker, silent)
    assert [verdict.verdict for verdict in found] == ["accepted"] * 3
    names = [Path(text).stem for text in asked.read_text().splitlines()]
    assert names == ["one", "two", "one", "three"]  # of the first one, the command had said nothing
    assert check_proofs(path, out, checker, silent) == found
    assert len(asked.read_text().splitlines()) == 4


def test_verdicts_of_another_call_are_neither_used_nor_lost(tmp_path: Path) -> None:
    path, out, script = tmp_path / "proofs.jsonl", tmp_path / "verdicts.jsonl", tmp_path / "prover.sh"
    path.write_text(line("one", "by simp"))
    script.write_text("exit 0\n")
    command = f"sh {script}"
    check_proofs(path, out, ProofChecker(command, 10.0), silent)
    found = out.read_bytes()

    def refused(command: str, limit: float) -> None:
        with pytest.raises(ConfigError, match="holds something else than verdicts on these proofs"):
            check_proofs(path, out, ProofChecker(command, limit), silent)
        assert out.read_bytes() == found

    refused("false", 10.0)
    refused(command, 20.0)
    path.write_text(line("one", "by auto"))
    refused(command, 10.0)
    path.write_text(line("one", "by simp"))
    script.write_text("exit 1\n")
    refused(command, 10.0)
    with pytest.raises(ConfigError, match="something else"):
        check_proofs(path, path, ProofChecker(command, 10.0), silent)
    assert path.read_text() == line("one", "by simp")
    with try_claim_name(tmp_path, out.name), pytest.raises(ConfigError, match="another call is at work"):
        check_proofs(path, out, ProofChecker(command, 10.0), silent)
