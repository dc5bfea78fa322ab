"""The peers do the work that they are measured by: sessions apart, and the model's own outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
import psutil
import pytest
import torch

from benchmarks.peers import naive, triton
from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from server.model.spec import initial_value, load
from training.model import unroll

Outputs = Callable[[np.ndarray], np.ndarray]

needs_triton = pytest.mark.skipif(
    not triton.is_installed(), reason="Triton is not installed: python -m benchmarks.peers.triton install"
)


def random_inputs(num_steps: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (num_steps, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def stub() -> Iterator[session_service_pb2_grpc.SessionServiceStub]:
    with naive.serving() as (address, _), grpc.insecure_channel(address) as channel:
        yield session_service_pb2_grpc.SessionServiceStub(channel)


@pytest.fixture(scope="module")
def expected() -> Outputs:
    cell = naive.make_cell()

    def run(inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits, _ = unroll(cell, torch.from_numpy(inputs)[:, None])
        return torch.sigmoid(logits[:, 0]).numpy()

    return run


def test_a_session_gives_the_cells_outputs_however_its_steps_are_split(
    stub: session_service_pb2_grpc.SessionServiceStub, expected: Outputs
) -> None:
    inputs = random_inputs(6, seed=0)
    session_id = stub.CreateSession(pb.CreateSessionRequest(model_name="copy")).session.session_id

    first, second = (
        stub.Step(pb.StepRequest(session_id=session_id, inputs=to_message(part)))
        for part in (inputs[:2], inputs[2:])
    )

    outputs = np.concatenate([to_array(first.outputs), to_array(second.outputs)])
    assert (outputs.shape, first.next_step, second.next_step) == ((6, 8), 2, 6)
    np.testing.assert_allclose(outputs, expected(inputs), atol=1e-5)


def test_two_sessions_on_one_stream_stay_apart(
    stub: session_service_pb2_grpc.SessionServiceStub, expected: Outputs
) -> None:
    inputs = {"a": random_inputs(5, seed=1), "b": random_inputs(5, seed=2)}
    for session_id in inputs:
        stub.CreateSession(pb.CreateSessionRequest(model_name="copy", session_id=session_id))

    requests = [
        pb.StreamStepsRequest(
            step=pb.StepRequest(session_id=session_id, inputs=to_message(inputs[session_id][step, None]))
        )
        for step in range(5)
        for session_id in inputs
    ]
    answers = list(stub.StreamSteps(iter(requests)))

    assert [answer.session_id for answer in answers] == ["a", "b"] * 5
    for number, session_id in enumerate(inputs):
        outputs = np.concatenate([to_array(answer.step.outputs) for answer in answers[number::2]])
        np.testing.assert_allclose(outputs, expected(inputs[session_id]), atol=1e-5)


def test_a_session_that_was_never_created_is_not_found(
    stub: session_service_pb2_grpc.SessionServiceStub,
) -> None:
    request = pb.StepRequest(session_id="nobody", inputs=to_message(random_inputs(1, seed=0)))

    with pytest.raises(grpc.RpcError) as caught:
        stub.Step(request)

    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with triton.serving(num_sequences=2) as (address, _):
        yield address


@needs_triton
def test_two_interleaved_sequences_give_what_onnx_runtime_gives(address: str) -> None:
    inputs = {1: random_inputs(12, seed=1), 2: random_inputs(12, seed=2)}

    outputs: dict[int, list[np.ndarray]] = {1: [], 2: []}
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(triton.UNARY_METHOD)
        for step in range(12):
            calls = {
                sequence_id: infer.future(
                    triton.step_message(sequence_id, rows[step], start=step == 0, end=step == 11)
                )
                for sequence_id, rows in inputs.items()
            }
            for sequence_id, call in calls.items():
                outputs[sequence_id].append(triton.outputs(call.result()))

    for sequence_id, rows in inputs.items():
        np.testing.assert_allclose(outputs[sequence_id], plain_run(triton.MODEL, rows), atol=1e-5)


@needs_triton
def test_a_sequence_on_a_stream_starts_afresh_with_its_first_message(address: str) -> None:
    inputs = random_inputs(8, seed=3)
    messages = [triton.step_message(3, row, start=step % 4 == 0) for step, row in enumerate(inputs)]
    messages.append(triton.step_message(3, inputs[0], end=True))

    with grpc.insecure_channel(address) as channel:
        stream = channel.stream_stream(triton.STREAM_METHOD)
        outputs = [triton.stream_outputs(answer) for answer in stream(iter(messages))]

    np.testing.assert_allclose(outputs[:4], plain_run(triton.MODEL, inputs[:4]), atol=1e-5)
    np.testing.assert_allclose(outputs[4:8], plain_run(triton.MODEL, inputs[4:]), atol=1e-5)


@needs_triton
def test_a_sequence_begun_by_a_unary_call_goes_on_over_a_stream(address: str) -> None:
    inputs = random_inputs(5, seed=4)
    first, *rest = (
        triton.step_message(4, row, start=step == 0, end=step == 4) for step, row in enumerate(inputs)
    )

    with grpc.insecure_channel(address) as channel:
        outputs = [triton.outputs(channel.unary_unary(triton.UNARY_METHOD)(first))]
        answers = channel.stream_stream(triton.STREAM_METHOD)(iter(rest))
        outputs += [triton.stream_outputs(answer) for answer in answers]

    np.testing.assert_allclose(outputs, plain_run(triton.MODEL, inputs), atol=1e-5)


@needs_triton
def test_nothing_runs_on_after_the_block() -> None:
    with triton.serving(num_sequences=1) as (_, pids):
        running = [psutil.pid_exists(pid) for pid in pids]

    assert len(running) >= 2, "the server and the backend that runs the model"
    assert all(running)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def plain_run(model: Path, inputs: np.ndarray) -> np.ndarray:
    """What the exported step gives, one row at a time."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    spec = load(model, "copy", 1).spec
    states = {state.input_name: initial_value(state)[None] for state in spec.states}
    outputs = []
    for row in inputs:
        output, *values = session.run(
            [spec.outputs[0].name, *(state.output_name for state in spec.states)],
            {spec.inputs[0].name: row[None], **states},
        )
        states = dict(zip(states, values, strict=True))
        outputs.append(output[0])
    return np.array(outputs)
