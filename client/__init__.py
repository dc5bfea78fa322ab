"""The Python client: sessions on a server, by numpy arrays.

    with Client("127.0.0.1:50051") as client, client.session("copy") as session:
        outputs = session.run(inputs)

A call that is repeated after a lost connection takes effect once: the client names every session and numbers
every step. `AsyncClient` is the same for asyncio. It imports neither `server` nor torch.
"""

from client.aio import AsyncClient, AsyncSession
from client.calls import BatchResult, Trace
from client.errors import (
    AlreadyExistsError,
    ClientError,
    DeadlineError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    ResourceExhaustedError,
    StepOrderError,
    UnavailableError,
    UnimplementedError,
)
from client.sync import Client, Session

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncSession",
    "BatchResult",
    "Client",
    "ClientError",
    "DeadlineError",
    "InternalError",
    "InvalidInputError",
    "NotFoundError",
    "ResourceExhaustedError",
    "Session",
    "StepOrderError",
    "Trace",
    "UnavailableError",
    "UnimplementedError",
]
