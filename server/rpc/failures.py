"""Failures: what is said of a call that fails, to its caller, in the log and in the metrics, under one request id.

`status.py` has the codes and reasons. A caller gives an id of its own as the metadata `x-request-id`, as many routers
do by themselves; one that cannot be used is replaced. An id is looked for only once a call has failed.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

import grpc
import structlog

from server.metrics import Metrics
from server.rpc import status

log = structlog.get_logger()

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARACTERS = 128
MOST_CHARACTERS_LOGGED = 256
"""Of what a caller has sent, a session's id say, that may be none."""
_USABLE = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_REQUEST_ID_CHARACTERS}}}")

Metadata = Iterable[tuple[str, str | bytes]]

_SERVERS_OWN = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE})
"""What no caller can mend: the log has a line for each such call. The others know all there is from their answer."""
_ORDINARY = frozenset({"SERVER_STOPPING", "WRONG_REPLICA"})
"""Of these what is no fault, and is mended by a call to another server."""


def request_id_of(metadata: Metadata) -> str:
    """The id that a caller has given its call, if it can be used, or a new one of 64 random bits."""
    given = [value for key, value in metadata if key == REQUEST_ID_KEY]
    if len(given) == 1 and isinstance(given[0], str) and _USABLE.fullmatch(given[0]):
        return given[0]
    return secrets.token_hex(8)


class Failures:
    """Tells of calls that fail."""

    def __init__(self, metrics: Metrics) -> None:
        """Count them in a server's metrics."""
        self._metrics = metrics
        metrics.expect_refusals(status.REASONS)

    def tell(self, rpc: str, error: BaseException, metadata: Metadata, **about: str | int) -> status.Status:
        """Count and log a failure; returns what its caller is to be told.

        Args:
            rpc: the method's name.
            error: why it failed.
            metadata: what the caller sent beside its request.
            about: more for the log; what is empty is left out.
        """
        told = status.of(error, request_id_of(metadata))
        self._metrics.count_refusal(told.reason)
        fields = {"rpc": rpc, "request_id": told.request_id} | {k: v for k, v in about.items() if v != ""}
        if told.reason == status.BUG:
            log.error("a call failed unexpectedly", **fields, exc_info=error)
        elif told.code in _SERVERS_OWN and told.reason not in _ORDINARY:
            log.warning(
                "a call failed", **fields, code=told.code.name, reason=told.reason, problem=told.message
            )
        return told
