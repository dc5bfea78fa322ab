"""Routing: which servers an address names, and which of them a call goes to.

Where an address names several replicas, gRPC itself chooses one for each call, by a consistent hash of the call's
routing key. Calls of one session go to one replica; when a replica comes or goes, only the sessions whose place on the
ring changes move. gRPC watches each replica's health service, so that one that stops gets no more calls.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import Any, Generic, TypeVar

C = TypeVar("C")

Address = str | Sequence[str]
Options = Sequence[tuple[str, Any]]

ROUTING_KEY = "ntm-routing-key"

LOOKUP_INTERVAL_S = 5.0
"""Seconds after which a name is looked up again, by the next call."""

_RING_SIZE = 4096  # the most that gRPC allows: the larger, the fewer sessions move
_ROUTED_OPTIONS: Options = [
    (
        "grpc.service_config",
        json.dumps(
            {
                "loadBalancingConfig": [
                    {"ring_hash_experimental": {"requestHashHeader": ROUTING_KEY, "minRingSize": _RING_SIZE}}
                ],
                "healthCheckConfig": {"serviceName": ""},
            }
        ),
    ),
    # The configuration is the one above, not one in the name's TXT records.
    ("grpc.service_config_disable_resolution", 1),
    # After a connection broke, the name is looked up again at once, not half a minute later.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]


@dataclass(frozen=True)
class Target:
    """What gRPC connects to."""

    name: str
    """As gRPC takes it."""
    hosts: tuple[str, ...]
    """Host names or IP addresses in it."""
    is_routed: bool = False
    """Several replicas may be behind it, and each call chooses one by its routing key."""
    is_looked_up: bool = False
    """It is a name whose addresses may change."""
    authority: Options = ()
    """Without TLS, the option that says what the servers are called; of a list gRPC would give all as one name."""

    @property
    def options(self) -> Options:
        """Channel options that it needs."""
        if not self.is_routed:
            return []
        # gRPC reads this when it is given the service config; without it, it knows no `requestHashHeader`.
        os.environ["GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"] = "true"
        return _ROUTED_OPTIONS


def target(address: Address) -> Target:
    """What an address means: HOST:PORT is one server, dns:///NAME:PORT and a list are replicas.

    Raises:
        ValueError: it names no server. OSError: a name in a list cannot be looked up.
    """
    if isinstance(address, str):
        if address.startswith("dns:"):
            return Target(address, (_host(address.rpartition("/")[2].removeprefix("dns:")),), True, True)
        return Target(address, (_host(address),))
    if not address:
        raise ValueError("the list of addresses is empty: give at least one HOST:PORT")
    endpoints = [_endpoint(entry) for entry in address]
    versions = {ipaddress.ip_address(ip).version for ip, _ in endpoints}
    if len(versions) > 1:
        raise ValueError("the list has addresses of IPv4 and of IPv6: give those of one kind")
    if versions == {4}:
        name = "ipv4:" + ",".join(f"{ip}:{port}" for ip, port in endpoints)
    else:
        name = "ipv6:" + ",".join(f"[{ip}]:{port}" for ip, port in endpoints)
    authority = [("grpc.default_authority", address[0])]
    return Target(name, tuple(map(_host, address)), is_routed=True, authority=authority)


def _host(address: str) -> str:
    if address.startswith(("unix:", "unix-abstract:")):
        return "localhost"
    host, colon, _ = address.rpartition(":")
    return (host if colon else address).removeprefix("[").removesuffix("]")


def _endpoint(address: str) -> tuple[str, int]:
    """The IP address and the port of one entry of a list."""
    port = address.rpartition(":")[2]
    host = _host(address)
    if not (host and port.isdecimal()) or "/" in address:
        raise ValueError(f"{address!r} in the list of addresses is not HOST:PORT")
    found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    by_version = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(by_version[0][4][0]), int(port)


class Renewed(Generic[C]):
    """The connection that calls go out on, and from time to time a new one, which looks the name up again.

    gRPC looks a name up when a connection breaks, so that a replica which was added would get no calls. A new channel
    shares the connections of the one before, so it costs one look-up and no connection. The one before is closed
    when no call that began on it can be under way any more.
    """

    def __init__(self, open: Callable[[], C], interval_s: float | None, keep_s: float) -> None:
        """Open the first.

        Args:
            open: makes a connection.
            interval_s: seconds until the next; None: there is none.
            keep_s: seconds for which an earlier one may still be in use.
        """
        self._open = open
        self._interval_s = interval_s
        self._keep_s = keep_s
        self._lock = Lock()
        self._newest = open()
        self._renew_at_s = monotonic() + (interval_s or 0.0)
        self._earlier: deque[tuple[float, C]] = deque()

    @property
    def newest(self) -> C:
        """The one for a call that begins now."""
        if self._interval_s is not None and monotonic() >= self._renew_at_s:
            with self._lock:
                self._renew(monotonic())
        return self._newest

    def take_unused(self) -> list[C]:
        """Those that no call can be under way on any more, for their owner to close."""
        unused: list[C] = []
        if self._earlier:
            with self._lock:
                while self._earlier and self._earlier[0][0] <= monotonic():
                    unused.append(self._earlier.popleft()[1])
        return unused

    def take_all(self) -> list[C]:
        """Every one that is open, for its owner to close."""
        with self._lock:
            self._interval_s = None
            every = [self._newest, *(connection for _, connection in self._earlier)]
            self._earlier.clear()
            return every

    def _renew(self, now_s: float) -> None:
        if self._interval_s is None or now_s < self._renew_at_s:  # another thread came first
            return
        self._earlier.append((now_s + self._keep_s, self._newest))
        self._newest = self._open()
        self._renew_at_s = now_s + self._interval_s
