"""Ceph's object gateway on loopback: a real S3 server whose conditional PUT is atomic. For tests.

Debian's and Ubuntu's packages: RUNLEVEL=1 apt-get install --no-install-recommends radosgw ceph-mon ceph-osd
"""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from infra.s3.server import S3Endpoint
from tests.ports import free_port

_PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool")
_ACCESS_KEY, _SECRET_KEY = "test-access", "test-secret"
_SETTINGS = """
[global]
fsid = {fsid}
mon_host = 127.0.0.1
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = {folder}/keyring
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
mon_data = {folder}/mon
osd_data = {folder}/osd
bluestore_block_size = 4294967296
log_file = {folder}/$name.log
admin_socket = {folder}/$name.asok
run_dir = {folder}
crash_dir = {folder}
mon_cluster_log_file = {folder}/cluster.log
[client.rgw]
rgw_data = {folder}
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_dns_name = localhost
"""
_CAPABILITIES = {
    "mon.": "allow *",
    "client.admin": "allow *",
    "osd.0": "allow profile osd",
    "client.rgw": "allow rwx",
}


def missing_programs() -> list[str]:
    """What is not installed of what `ceph_s3` needs."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


@contextmanager
def ceph_s3(folder: Path) -> Iterator[S3Endpoint]:
    """A monitor, a storage daemon on a sparse file, and a gateway, in a folder with a short path (about 15 s).

    One at a time: the monitor takes the ports 3300 and 6789.
    """
    port = free_port()
    configuration = folder / "ceph.conf"
    configuration.write_text(_SETTINGS.format(folder=folder, port=port, fsid=uuid.uuid4()))
    for name in ("mon", "osd"):
        (folder / name).mkdir()

    def run(*command: str) -> str:
        call = [command[0], "-c", str(configuration), *command[1:]]
        return subprocess.run(call, check=True, capture_output=True, text=True, timeout=200).stdout

    for number, (name, mon) in enumerate(_CAPABILITIES.items()):
        new = [] if number else ["--create-keyring"]
        capabilities = ["--cap", "mon", mon, "--cap", "osd", "allow *"]
        subprocess.run(
            ["ceph-authtool", *new, str(folder / "keyring"), "--gen-key", "-n", name, *capabilities],
            check=True,
            capture_output=True,
        )
    run("ceph-mon", "--mkfs", "-i", "a", "--keyring", str(folder / "keyring"))
    with ExitStack() as stack:

        def start(*command: str) -> None:
            call = [command[0], "-c", str(configuration), "-f", *command[1:]]
            process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait, 30)
            stack.callback(process.kill)

        start("ceph-mon", "-i", "a")
        _until(lambda: "mon" in run("ceph", "--connect-timeout", "20", "-s"), "the monitor")
        disk = str(uuid.uuid4())
        run("ceph", "osd", "new", disk, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        start("ceph-osd", "-i", "0")
        _until(lambda: "1 up" in run("ceph", "osd", "stat"), "the storage daemon")
        start("radosgw", "-n", "client.rgw")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        _until(lambda: bool(opener.open(f"http://127.0.0.1:{port}/", timeout=20).read()), "the gateway")
        keys = ["--access-key", _ACCESS_KEY, "--secret-key", _SECRET_KEY]
        run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test", *keys)
        yield S3Endpoint(f"http://127.0.0.1:{port}", _ACCESS_KEY, _SECRET_KEY)


def _until(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if there():
                return
        except (OSError, subprocess.SubprocessError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come up within 300 s")
