"""Writes Swift's rings: where objects lie, here always on the one device d1.

Run as a script in a process of its own, because importing Swift patches the interpreter:
`rings.py FOLDER OBJECT_PORT CONTAINER_PORT ACCOUNT_PORT`.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PART_POWER = 4  # 16 partitions: the data is one disk's


def write_ring(folder: Path, kind: str, port: int) -> None:
    """Write `<kind>.ring.gz` for one replica on 127.0.0.1:port."""
    from swift.common.ring import RingBuilder  # type: ignore[import-untyped]

    builder = RingBuilder(_PART_POWER, 1, 0)
    device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1.0, "meta": ""}
    builder.add_dev(device | {"replication_ip": "127.0.0.1", "replication_port": port})
    builder.rebalance()
    builder.get_ring().save(str(folder / f"{kind}.ring.gz"))


def main() -> None:
    """Write the three rings."""
    folder, *ports = sys.argv[1:]
    for kind, port in zip(("object", "container", "account"), ports, strict=True):
        write_ring(Path(folder), kind, int(port))


if __name__ == "__main__":
    main()
