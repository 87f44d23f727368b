from __future__ import annotations

import socket

import pytest

from infra.ports import hold_port, port_of


def test_a_port_is_held_and_free_to_listen_on() -> None:
    with hold_port() as held, hold_port() as other:
        port = port_of(held)
        assert port != port_of(other)
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)):
            socket.create_connection(("127.0.0.1", port)).close()
