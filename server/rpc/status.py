"""Status: the one table from this server's errors to gRPC status codes and ErrorInfo reasons.

`errors.py` is free of gRPC; a test fails when a type there that a caller can meet has no row here.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2

from server import errors

DOMAIN = "ntm.v1"
DETAILS_KEY = "grpc-status-details-bin"
BUG = "BUG"
"""The reason of what no row below says."""

# Messages quote what the caller sent, and a status has to fit into gRPC's 8 KiB of metadata, twice over.
_MAX_MESSAGE_CHARACTERS = 500

_TABLE: dict[type[errors.ServingError], tuple[grpc.StatusCode, str]] = {
    errors.InvalidInputError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
    errors.ModelNotFoundError: (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    errors.ModelLeavingError: (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_LEAVING"),
    errors.SessionNotFoundError: (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"),
    errors.SessionExpiredError: (grpc.StatusCode.NOT_FOUND, "SESSION_EXPIRED"),
    errors.SessionExistsError: (grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS"),
    errors.SessionIdRetiredError: (grpc.StatusCode.ALREADY_EXISTS, "SESSION_ID_RETIRED"),
    errors.RequestIdReusedError: (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"),
    errors.StepGapError: (grpc.StatusCode.FAILED_PRECONDITION, "STEP_GAP"),
    errors.StepTooOldError: (grpc.StatusCode.FAILED_PRECONDITION, "STEP_TOO_OLD"),
    errors.InputMismatchError: (grpc.StatusCode.FAILED_PRECONDITION, "INPUT_MISMATCH"),
    errors.StateNotKeptError: (grpc.StatusCode.FAILED_PRECONDITION, "STATE_NOT_KEPT"),
    errors.NoFreeSlotError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_FREE_SLOT"),
    errors.QueueFullError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.QueueTooSlowError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.ServerOverloadedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.StepFailedError: (grpc.StatusCode.INTERNAL, "STEP_FAILED"),
    errors.OutputNotFiniteError: (grpc.StatusCode.INTERNAL, "OUTPUT_NOT_FINITE"),
    errors.StepTimedOutError: (grpc.StatusCode.INTERNAL, "STEP_TIMED_OUT"),
    errors.EngineFailedError: (grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    errors.ModelMismatchError: (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"),
    errors.ModelNotLoadedError: (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED"),
    errors.RecoveryNotExactError: (grpc.StatusCode.FAILED_PRECONDITION, "RECOVERY_NOT_EXACT"),
    errors.SessionCorruptError: (grpc.StatusCode.DATA_LOSS, "SESSION_CORRUPT"),
    errors.SessionQuarantinedError: (grpc.StatusCode.DATA_LOSS, "SESSION_QUARANTINED"),
    errors.SessionMovedError: (grpc.StatusCode.UNAVAILABLE, "SESSION_MOVED"),
    errors.WrongReplicaError: (grpc.StatusCode.UNAVAILABLE, "WRONG_REPLICA"),
    errors.StoreUnavailableError: (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    errors.StoreFullError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    errors.StoreCorruptError: (grpc.StatusCode.DATA_LOSS, "STORE_CORRUPT"),
    errors.LeaseLapsedError: (grpc.StatusCode.UNAVAILABLE, "LEASE_LAPSED"),
    errors.UnauthenticatedError: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDeniedError: (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.QuotaExceededError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.ServerStoppingError: (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING"),
}


REASONS = frozenset({reason for _, reason in _TABLE.values()} | {BUG})


@dataclass(frozen=True)
class Status:
    """An error as gRPC tells it."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None = None
    request_id: str = ""
    """Names the call that failed, as the log does; "" where it is not named."""

    @property
    def trailing(self) -> list[tuple[str, str | bytes]]:
        """The metadata that tells it whole."""
        return [(DETAILS_KEY, self.to_message().SerializeToString())]

    def to_message(self) -> status_pb2.Status:
        """As the rich error that travels in the trailing metadata `grpc-status-details-bin`."""
        info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=self.reason, metadata=self.metadata)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        status.details.add().Pack(info)
        if self.request_id:
            status.details.add().Pack(error_details_pb2.RequestInfo(request_id=self.request_id))
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(max(1, round(self.retry_after_s * 1e3)))
            status.details.add().Pack(retry)
        return status


def of(error: BaseException, request_id: str = "") -> Status:
    """The status of an error; one that is not ours is INTERNAL and says nothing of what is inside."""
    if not isinstance(error, errors.ServingError) or type(error) not in _TABLE:
        message = "something went wrong in the server, and its log says what; the session is as it was"
        return Status(grpc.StatusCode.INTERNAL, BUG, message, {}, None, request_id)
    code, reason = _TABLE[type(error)]
    message = str(error)
    if len(message) > _MAX_MESSAGE_CHARACTERS:
        message = message[: _MAX_MESSAGE_CHARACTERS - 1] + "…"
    return Status(code, reason, message, error.details, error.retry_after_s, request_id)
