"""What these tests share: calls whose refusals are values, and servers that end as they should or by a crash."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from tests.server.helpers import Caller
from tests.server.sessions.test_recovery import crash

T = TypeVar("T")


class Restarted(Caller):
    """A caller of a server that can be ended, so that another takes over its store."""

    async def end(self, by_crash: bool = True) -> None:
        await self.channel.close()
        await (crash(self.server) if by_crash else self.server.stop())


Restart = Callable[..., Awaitable[Restarted]]


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


async def refusal_of(call: Awaitable[object]) -> str:
    """The reason why a call has no answer; "" if it has."""
    answer = await tried(call)
    return answer if isinstance(answer, str) else ""
