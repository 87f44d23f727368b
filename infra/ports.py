"""Ports on loopback for servers that are about to start."""

from __future__ import annotations

import socket


def hold_port() -> socket.socket:
    """A socket that has a free port and does not listen: until it is closed, no other program is given this port.

    A server can listen there all the same, since servers set SO_REUSEADDR; it may take a minute until it does.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def taken(port: int, host: str = "127.0.0.1") -> str | None:
    """Why no server can listen there; None: one can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return str(error.strerror)
    return None


def port_of(held: socket.socket) -> int:
    """The port that it has."""
    return int(held.getsockname()[1])
