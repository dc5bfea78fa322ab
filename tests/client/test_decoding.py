"""What comes over the wire and is not what our server sends is an error of one type, and never a crash."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from ntm import StepOrderError, UnavailableError
from ntm._errors import from_rpc
from ntm._steps import outputs_of
from ntm.tensor import TensorError, to_message, type_name
from ntm.v1 import session_service_pb2, tensor_pb2


def failed(details: bytes, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION) -> SimpleNamespace:
    return SimpleNamespace(
        code=lambda: code,
        details=lambda: "it failed",
        trailing_metadata=lambda: [("grpc-status-details-bin", details)],
    )


def answer(**outputs: np.ndarray) -> session_service_pb2.StepResponse:
    named = [tensor_pb2.NamedTensor(name=n, value=to_message(value)) for n, value in outputs.items()]
    return session_service_pb2.StepResponse(named_outputs=named)


def test_a_status_whose_details_are_no_message_is_told_by_its_code() -> None:
    for details in (b"\xff", b"\x1a\x05abc"):
        error = from_rpc(failed(details, grpc.StatusCode.UNAVAILABLE))  # type: ignore[arg-type]

        assert isinstance(error, UnavailableError)
        assert "it failed" in str(error)


@pytest.mark.parametrize("told", ["", "NaN", "a b", "-1", "²"])
def test_a_next_step_that_is_no_number_is_none(told: str) -> None:
    status = status_pb2.Status(code=9)
    info = error_details_pb2.ErrorInfo(reason="STEP_GAP", domain="ntm.v1", metadata={"next_step": told})
    status.details.add().Pack(info)

    error = from_rpc(failed(status.SerializeToString()))  # type: ignore[arg-type]

    assert isinstance(error, StepOrderError)
    assert error.next_step is None


def test_a_time_to_wait_beyond_all_bounds_is_still_a_number() -> None:
    status = status_pb2.Status(code=8)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.seconds = 2**62
    for detail in (error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="ntm.v1"), retry):
        status.details.add().Pack(detail)

    error = from_rpc(failed(status.SerializeToString(), grpc.StatusCode.RESOURCE_EXHAUSTED))  # type: ignore[arg-type]

    assert error.retry_after_s == 2.0**62


@pytest.mark.parametrize(
    "outputs",
    [
        {"": np.zeros((2, 3))},
        {"a": np.zeros((2, 3)), "b": np.zeros((3, 3))},
        {"a": np.zeros((2, 3)), "b": np.float64(1)},
        {"a": np.zeros((2**40, 0)), "b": np.zeros((0, 3))},
    ],
)
def test_named_outputs_without_names_or_of_unequal_length_are_refused(outputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(TensorError, match="no names, or not all as many steps"):
        outputs_of(answer(**outputs))


def test_a_type_that_there_is_not_has_its_number_for_a_name() -> None:
    assert type_name(99) == "99"  # type: ignore[arg-type]
