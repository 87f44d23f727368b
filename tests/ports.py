"""Ports on loopback for servers of tests."""

from __future__ import annotations

import socket

from infra.ports import hold_port, port_of

_HELD: list[socket.socket] = []
"""A port is free for others when its socket ends."""


def free_port() -> int:
    """One that nobody listens on, and that nobody else is given as long as this process lasts."""
    _HELD.append(hold_port())
    return port_of(_HELD[-1])
