"""What these tests share: calls whose refusals are values, and servers that start again on the same store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from tests.server.helpers import Caller

T = TypeVar("T")

Restart = Callable[..., Awaitable[Caller]]


def reason_of(error: grpc.RpcError) -> str:
    """The reason in the server's ErrorInfo; the code's name where there is none."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if details is None:
        return str(error.code().name)
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info.reason


async def tried(call: Awaitable[T]) -> T | str:
    """A call's answer, or the reason why there is none."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
