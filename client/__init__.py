"""The Python client: sessions on a server, by numpy arrays.

    with Client("127.0.0.1:50051") as client, client.session("copy") as session:
        outputs = session.run(inputs)
        for outputs in session.stream(chunks):
            ...

A call that is repeated after a lost connection takes effect once: the client names every session and numbers
every step. It repeats by itself what a dead server or a router ended, and a stream goes on where it
broke. `AsyncClient` is the same for asyncio. It imports neither `server` nor torch.
"""

from client.aio import AsyncClient, AsyncSession
from client.calls import BatchResult, Trace
from client.errors import (
    AlreadyExistsError,
    ClientError,
    DataLossError,
    DeadlineError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
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
    "DataLossError",
    "DeadlineError",
    "InternalError",
    "InvalidInputError",
    "NotFoundError",
    "PreconditionError",
    "ResourceExhaustedError",
    "Session",
    "StepOrderError",
    "Trace",
    "UnavailableError",
    "UnimplementedError",
]
