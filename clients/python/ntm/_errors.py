"""What a call can fail with, as types: one for each thing a caller may want to do about it.

ClientError
├── RefusedError               the server will not do what it was asked: the same call would fail again
│   ├── InvalidInputError      INVALID_ARGUMENT: send something else
│   ├── NotFoundError          NOT_FOUND: no such model or session
│   ├── AlreadyExistsError     ALREADY_EXISTS: choose another id
│   ├── PreconditionError      FAILED_PRECONDITION: the session does not fit what is served here
│   │   └── StepOrderError     the session is at another step, `next_step`
│   ├── UnauthenticatedError   UNAUTHENTICATED: the server does not know who calls
│   ├── PermissionDeniedError  PERMISSION_DENIED: whoever calls may not do this
│   ├── DataLossError          DATA_LOSS: the session cannot be brought back as it was
│   └── UnimplementedError     UNIMPLEMENTED: the server does not have this rpc
├── TransientError             the same call may succeed later, and can be made again
│   ├── UnavailableError       UNAVAILABLE, or ended on the way, also after the retries: no server was reached
│   ├── DeadlineError          DEADLINE_EXCEEDED: no answer in time
│   └── ResourceExhaustedError RESOURCE_EXHAUSTED: try again later, or ask for less
└── InternalError              everything else: the model or the server failed

`UnavailableError` is what the client repeats by itself, and `ResourceExhaustedError` where the server says when. A call
that ended INTERNAL, CANCELLED or UNKNOWN without a reason of the server's is one of the first: a router, or a server
that was killed, ended it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DOMAIN = "ntm.v1"
_STATUS_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID = "request_id"


class ClientError(Exception):
    """A call failed."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        metadata: dict[str, str],
        request_id: str = "",
    ) -> None:
        named = f", request {request_id}" if request_id else ""
        super().__init__(f"{message} [{code.name}{'/' + reason if reason else ''}{named}]")
        self.code = code
        """The gRPC status code."""
        self.reason = reason
        """The server's stable reason, such as "STEP_GAP"; "" where there is none."""
        self.metadata = metadata
        """More about it, such as the field at fault."""
        self.request_id = request_id
        """Names the call in the server's log; "" where the server did not answer it."""
        self.retry_after_s: float | None = None
        """After how many seconds the server would take the same call, if it said so. The client waits by itself."""


class RefusedError(ClientError):
    """The server will not do what it was asked to: made again as it is, the call fails again."""


class InvalidInputError(RefusedError):
    """The server refused what was sent; `metadata["field"]` names the field at fault."""


class NotFoundError(RefusedError):
    """There is no such model or session."""


class AlreadyExistsError(RefusedError):
    """The id of a new session is taken."""


class PreconditionError(RefusedError):
    """The session, or the snapshot, does not fit what is served here; `reason` says how: its model file is another
    one (MODEL_MISMATCH) or is not in service (MODEL_NOT_LOADED), or it ran on another machine or build, so that its
    replay may differ in the last bits (RECOVERY_NOT_EXACT)."""


class StepOrderError(PreconditionError):
    """The session is at another step than the call supposed."""

    @property
    def next_step(self) -> int | None:
        """The session's counter, if the server told it."""
        told = self.metadata.get("next_step", "")
        return int(told) if told.isascii() and told.isdecimal() else None


class DataLossError(RefusedError):
    """The session cannot be brought back as it was: delete it, and replay its inputs in a new one."""


class UnauthenticatedError(RefusedError):
    """The server does not know who calls: give the client a `token`, or `tls` with a certificate, that it knows."""


class PermissionDeniedError(RefusedError):
    """Whoever calls may not do this."""


class TransientError(ClientError):
    """The same call may succeed later; making it again is safe."""


class ResourceExhaustedError(TransientError):
    """No free slot, a full queue, a full store, or a message too large."""


class UnavailableError(TransientError):
    """The server cannot be reached, and could not for as long as the client tried.

    `code` is not always UNAVAILABLE: what stands between may have ended the call with INTERNAL, CANCELLED or UNKNOWN.
    """


class DeadlineError(TransientError):
    """No answer came in time; repeating the same call is safe."""


class UnimplementedError(RefusedError):
    """The server does not have this rpc."""


class InternalError(ClientError):
    """The model or the server failed."""


_TYPES: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_STEP_ORDER_REASONS = {"STEP_GAP", "STEP_TOO_OLD", "INPUT_MISMATCH", "STATE_NOT_KEPT"}
# With these codes our server always gives a reason; without one they come from somewhere else.
_CODES_OF_BROKEN_CALLS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}


@contextmanager
def translated() -> Iterator[None]:
    """Raise what gRPC raises in the block as a ClientError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def from_rpc(error: grpc.RpcError) -> ClientError:
    """The error of a call that failed, from its status and the server's ErrorInfo, where one came with it."""
    # Both grpc.Call, which sync errors also are, and grpc.aio.AioRpcError have these.
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == _STATUS_DETAILS_KEY:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            request = error_details_pb2.RequestInfo()
            try:
                for detail in status_pb2.Status.FromString(value).details:
                    detail.Unpack(info)
                    detail.Unpack(retry)
                    detail.Unpack(request)
            except DecodeError:  # not from our server: something in between wrote it, or cut it
                continue
            if info.domain == _DOMAIN:
                about = dict(info.metadata) | (
                    {_REQUEST_ID: request.request_id} if request.request_id else {}
                )
                told = from_status(code.value[0], info.reason, message, about)
                if retry.HasField("retry_delay"):
                    told.retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
                return told
    if code in _CODES_OF_BROKEN_CALLS:
        return UnavailableError(code, "", message, {})
    return from_status(code.value[0], "", message, {})


def from_status(code: int, reason: str, message: str, metadata: dict[str, str]) -> ClientError:
    """The error for a status code and what goes with it; its metadata names the request, if anything does."""
    status_code = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    error_type = _TYPES.get(status_code, InternalError)
    if error_type is PreconditionError and reason in _STEP_ORDER_REASONS:
        error_type = StepOrderError
    request_id = metadata.pop(_REQUEST_ID, "")
    return error_type(status_code, reason, message, metadata, request_id)
