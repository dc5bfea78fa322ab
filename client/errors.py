"""What a call can fail with, as types: one for each thing a caller may want to do about it.

ClientError
├── InvalidInputError          INVALID_ARGUMENT: send something else
├── NotFoundError              NOT_FOUND: no such model or session
├── AlreadyExistsError         ALREADY_EXISTS: choose another id
├── StepOrderError             FAILED_PRECONDITION: the session is at another step, `next_step`
├── ResourceExhaustedError     RESOURCE_EXHAUSTED: try again later, or ask for less
├── UnavailableError           UNAVAILABLE, also after the retries: the server cannot be reached
├── DeadlineError              DEADLINE_EXCEEDED: no answer in time; the call may be repeated
├── UnimplementedError         UNIMPLEMENTED: the server does not have this rpc
└── InternalError              everything else: the model or the server failed
"""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_STATUS_DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """A call failed."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, metadata: dict[str, str]) -> None:
        super().__init__(f"{message} [{code.name}{'/' + reason if reason else ''}]")
        self.code = code
        """The gRPC status code."""
        self.reason = reason
        """The server's stable reason, such as "STEP_GAP"; "" where there is none."""
        self.metadata = metadata
        """More about it, such as the field at fault."""


class InvalidInputError(ClientError):
    """The server refused what was sent; `metadata["field"]` names the field at fault."""


class NotFoundError(ClientError):
    """There is no such model or session."""


class AlreadyExistsError(ClientError):
    """The id of a new session is taken."""


class StepOrderError(ClientError):
    """The session is at another step than the call supposed."""

    @property
    def next_step(self) -> int | None:
        """The session's counter, if the server told it."""
        told = self.metadata.get("next_step")
        return None if told is None else int(told)


class ResourceExhaustedError(ClientError):
    """No free slot, a full queue, or a message too large."""


class UnavailableError(ClientError):
    """The server cannot be reached, and could not for as long as the client tried."""


class DeadlineError(ClientError):
    """No answer came in time; repeating the same call is safe."""


class UnimplementedError(ClientError):
    """The server does not have this rpc."""


class InternalError(ClientError):
    """The model or the server failed."""


_TYPES: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: StepOrderError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc(error: grpc.RpcError) -> ClientError:
    """The error of a call that failed, from its status and the ErrorInfo that came with it."""
    # Both grpc.Call, which sync errors also are, and grpc.aio.AioRpcError have these.
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    trailing: Any = error.trailing_metadata() or ()
    info = error_details_pb2.ErrorInfo()
    for key, value in trailing:
        if key == _STATUS_DETAILS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                detail.Unpack(info)
    return from_status(code.value[0], info.reason, message, dict(info.metadata))


def from_status(code: int, reason: str, message: str, metadata: dict[str, str]) -> ClientError:
    """The error for a status code and what goes with it."""
    status_code = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    return _TYPES.get(status_code, InternalError)(status_code, reason, message, metadata)
