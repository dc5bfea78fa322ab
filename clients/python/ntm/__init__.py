"""The Python client: sessions on a server, by numpy arrays.

    from ntm import Client

    with Client("127.0.0.1:50051") as client, client.session("copy") as session:
        outputs = session.run(inputs)
        for outputs in session.stream(chunks):
            ...

A call that is repeated after a lost connection takes effect once: the client names every session and numbers
every step. It repeats by itself what a dead server or a router ended, and a stream goes on where it
broke. `AsyncClient` is the same for asyncio.

`ntm.v1` holds the messages and stubs of the gRPC API, and `ntm.tensor` turns their tensors into arrays; a program may
use these alone. So the client is imported when one of its names is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntm._async import AsyncClient, AsyncSession
    from ntm._channel import Tls
    from ntm._errors import (
        AlreadyExistsError,
        ClientError,
        DataLossError,
        DeadlineError,
        InternalError,
        InvalidInputError,
        NotFoundError,
        PermissionDeniedError,
        PreconditionError,
        RefusedError,
        ResourceExhaustedError,
        StepOrderError,
        TransientError,
        UnauthenticatedError,
        UnavailableError,
        UnimplementedError,
    )
    from ntm._results import BatchResult, Trace, Watched
    from ntm._steps import Steps
    from ntm._sync import Client, Session
else:
    import importlib

    _MODULES = {
        "AsyncClient": "ntm._async",
        "AsyncSession": "ntm._async",
        "BatchResult": "ntm._results",
        "Client": "ntm._sync",
        "Session": "ntm._sync",
        "Steps": "ntm._steps",
        "Tls": "ntm._channel",
        "Trace": "ntm._results",
        "Watched": "ntm._results",
    }

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES.get(name, "ntm._errors")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
    "PermissionDeniedError",
    "PreconditionError",
    "RefusedError",
    "ResourceExhaustedError",
    "Session",
    "StepOrderError",
    "Steps",
    "Tls",
    "Trace",
    "TransientError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Watched",
]
