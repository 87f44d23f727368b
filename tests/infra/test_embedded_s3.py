from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.processes import ProcessRecord
from infra.s3 import server
from infra.s3.embedded import embedded_s3
from infra.s3.service import storage_service
from neox_core.config import StorageConfig
from neox_core.errors import StorageError
from neox_core.storage.object_store import ObjectStore

CONFIG = StorageConfig(url="s3://llemma/toy", endpoint_url="embedded", region="eu-west-1")

USER = """
import sys
from pathlib import Path
from infra.s3.embedded import embedded_s3
with embedded_s3(Path(sys.argv[1])) as endpoint:
    print(endpoint.url, flush=True)
    sys.stdin.read()
"""


def start_user(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Another process that uses the server until its input ends; the server's address as it sees it."""
    command = [sys.executable, "-c", USER, str(folder)]
    user = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout
    return user, user.stdout.readline().strip()


def processes(folder: Path) -> list[ProcessRecord]:
    """The server's processes as recorded."""
    return [ProcessRecord(**record) for record in json.loads((folder / "server.json").read_text())["processes"]]


def test_a_user_id_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("infra.s3.server.pwd.getpwuid", unknown)
    with pytest.raises(StorageError, match=r"user id \d+ has no name in /etc/passwd.*storage.endpoint_url"):
        server._prepare(tmp_path, None)


def test_service_passes_other_servers_through(tmp_path: Path) -> None:
    for config in (StorageConfig(url="s3://b/p"), StorageConfig(url="s3://b/p", endpoint_url="http://127.0.0.1:1")):
        before = dict(os.environ)
        with storage_service(config, tmp_path) as resolved:
            assert resolved == config
            assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


def test_service_gives_a_bucket_and_keys_and_takes_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the user's own")
    monkeypatch.setenv("AWS_PROFILE", "the user's own")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    before = dict(os.environ)
    with storage_service(CONFIG, tmp_path) as config:
        assert (config.url, config.region) == ("s3://llemma/toy", "us-east-1")
        ObjectStore(config).check()
        code = f"""
from neox_core.storage.object_store import ObjectStore
from neox_core.config import StorageConfig
ObjectStore(StorageConfig(**{config.model_dump()!r})).put_text("from a child", "text")
"""
        subprocess.run([sys.executable, "-c", code], check=True)
        assert ObjectStore(config).get_text("from a child") == "text"
    assert dict(os.environ) == before
    assert processes(tmp_path / "s3") == []


def test_data_and_address_survive_a_restart_and_kill_9(tmp_path: Path) -> None:
    with storage_service(CONFIG, tmp_path) as first:
        ObjectStore(first).put_text("key", "kept")
        killed = processes(tmp_path / "s3")
        assert len(killed) == 4
        assert all(process.is_alive() for process in killed)
    assert not any(process.is_alive() for process in killed)

    with storage_service(CONFIG, tmp_path) as second:
        assert second == first
        assert ObjectStore(second).get_text("key") == "kept"
        killed = processes(tmp_path / "s3")
        killed[0].send(signal.SIGKILL)
        with storage_service(CONFIG, tmp_path) as third:  # a dead server is started again for the next user
            assert third == first
            assert ObjectStore(third).get_text("key") == "kept"
            restarted = processes(tmp_path / "s3")
            assert not any(process.is_alive() for process in killed)
        assert all(process.is_alive() for process in restarted)  # still in use
    assert not any(process.is_alive() for process in restarted)


def test_two_processes_share_a_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    first, first_url = start_user(tmp_path)
    second, second_url = start_user(tmp_path)
    assert first_url == second_url
    running = processes(tmp_path)
    first.communicate()
    assert first.returncode == 0
    assert all(process.is_alive() for process in running)
    second.communicate()
    assert second.returncode == 0
    assert not any(process.is_alive() for process in running)


def test_two_processes_at_once_start_one_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", USER, str(tmp_path)]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    urls = {user.stdout.readline() for user in users if user.stdout}
    running = processes(tmp_path)
    for user in users:
        user.communicate()
    assert len(urls) == 1
    assert [user.returncode for user in users] == [0, 0]
    assert not any(process.is_alive() for process in running)


def test_a_killed_user_leaves_a_server_that_the_next_one_takes_over(tmp_path: Path) -> None:
    user, url = start_user(tmp_path)
    user.kill()
    user.communicate()
    left = processes(tmp_path)
    assert all(process.is_alive() for process in left)
    with embedded_s3(tmp_path) as endpoint:
        assert endpoint.url == url
        assert processes(tmp_path) == left
    assert not any(process.is_alive() for process in left)


def test_a_server_that_is_slow_to_answer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not ended under those who use it."""
    is_healthy, busy = server._is_healthy, iter([True, True])
    with embedded_s3(tmp_path) as first:
        before = processes(tmp_path)
        monkeypatch.setattr(server, "_is_healthy", lambda state: not next(busy, False) and is_healthy(state))
        with embedded_s3(tmp_path) as second:
            assert second == first
            assert processes(tmp_path) == before


def test_a_server_whose_start_was_cut_short_is_started_again(tmp_path: Path) -> None:
    with embedded_s3(tmp_path) as first:
        state = json.loads((tmp_path / "server.json").read_text())
        (tmp_path / "server.json").write_text(json.dumps(state | {"processes": state["processes"][:2]}))
        left = [ProcessRecord(**record) for record in state["processes"]]
        for process in left[2:]:
            process.send(signal.SIGKILL)
        with embedded_s3(tmp_path) as second:
            assert second == first
            assert len(processes(tmp_path)) == 4
            assert not any(process.is_alive() for process in left)


def test_a_pid_that_belongs_to_another_program_by_now_is_left_alone(tmp_path: Path) -> None:
    with embedded_s3(tmp_path) as first:
        pass
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        state = json.loads((tmp_path / "server.json").read_text())
        state["processes"] = [{"pid": other.pid, "started": time.time() - 3600}] * 4
        (tmp_path / "server.json").write_text(json.dumps(state))
        with embedded_s3(tmp_path) as endpoint:
            assert endpoint == first
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PORT_GRACE_SECONDS", 0.0)
    with storage_service(CONFIG, tmp_path) as first:
        ObjectStore(first).put_text("key", "kept")
    ports = json.loads((tmp_path / "s3" / "server.json").read_text())["ports"]
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", ports["object"]))
        thief.listen()
        with storage_service(CONFIG, tmp_path) as second:
            assert ObjectStore(second).get_text("key") == "kept"


def test_without_swift_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_programs", lambda: tmp_path)
    with (
        pytest.raises(StorageError, match=r'pip install "llemma-pretrain\[s3-server\]"'),
        storage_service(CONFIG, tmp_path),
    ):
        pass


def test_a_file_system_without_attributes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    with (
        pytest.raises(StorageError, match=f"file system of {tmp_path}/s3 has no extended attributes"),
        storage_service(CONFIG, tmp_path),
    ):
        pass


def test_a_port_that_another_program_has_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens there, which is not taken for an answer of Swift's."""
    choose = server._free_ports
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(server, "_free_ports", lambda: {**choose(), "object": taken})
        monkeypatch.setattr(server, "_becomes_free", lambda port: monkeypatch.undo() or port != taken)
        with storage_service(CONFIG, tmp_path) as config:
            ObjectStore(config).put_bytes("a", b"1")
            ports = json.loads((tmp_path / "s3" / "server.json").read_text())["ports"]
    assert ports["object"] != taken
