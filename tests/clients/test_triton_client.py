"""Triton's own Python client against a real server: sequences, streams, errors, and what it gives beside `ntm.v1`.

The client pins an older protobuf than the server's, so it runs from an environment of its own (`make test` makes it).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntm import Client
from tests import step_models
from tests.conftest import ServerProcess

PYTHON = Path(sys.prefix) / "triton" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no environment for tritonclient: `make test` makes .venv/triton"
)

HEAD = """
import asyncio, json, queue, sys
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

address = sys.argv[1]

def steps(seed, num_steps):
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, 3)).astype(np.float32)

def tensor(array, module=triton):
    one = module.InferInput("x", list(array.shape), "FP32")
    one.set_data_from_numpy(array)
    return one

client = triton.InferenceServerClient(address)
"""


def run(address: str, program: str) -> Any:
    """Run a program of Triton's client; returns what it prints as JSON."""
    ended = subprocess.run(
        [str(PYTHON), "-c", HEAD + program, address], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def steps(seed: int, num_steps: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, 3)).astype(np.float32)


@pytest.fixture
def address(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> str:
    step_models.write(tmp_path, step_models.accumulator(), "accumulator")
    return start_server(tmp_path).address


def alone(address: str, inputs: np.ndarray) -> np.ndarray:
    """What the project's own API gives for a session's steps."""
    with Client(address) as client, client.session("accumulator") as session:
        return session.run(inputs)


def test_the_server_and_its_models_are_described_as_the_client_asks(address: str) -> None:
    told = run(
        address,
        """
config = client.get_model_config("accumulator", as_json=True)["config"]
metadata = client.get_model_metadata("accumulator", as_json=True)
print(json.dumps({
    "live": client.is_server_live(), "ready": client.is_server_ready(),
    "model": client.is_model_ready("accumulator"), "other": client.is_model_ready("other"),
    "server": client.get_server_metadata().name, "inputs": metadata["inputs"], "config": config,
    "index": client.get_model_repository_index(as_json=True)["models"],
}))
""",
    )

    assert (told["live"], told["ready"], told["model"], told["other"]) == (True, True, True, False)
    assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}]
    assert told["config"]["max_batch_size"] == 64
    assert "sequence_batching" in told["config"]
    assert told["index"] == [{"name": "accumulator", "version": "1", "state": "READY"}]


@pytest.mark.parametrize("sequence_id", [7, "a name/with: signs"])
def test_a_sequence_of_unary_requests_gives_bit_for_bit_what_a_session_gives(
    address: str, sequence_id: int | str
) -> None:
    given = run(
        address,
        f"""
outputs = []
for i, step in enumerate(steps(0, 5)):
    result = client.infer("accumulator", [tensor(step[None])], sequence_id={sequence_id!r},
                          sequence_start=i == 0, sequence_end=i == 4)
    outputs.append(result.as_numpy("y").tolist())
print(json.dumps(outputs))
""",
    )

    np.testing.assert_array_equal(np.array(given, np.float32)[:, 0], alone(address, steps(0, 5)))


def test_several_sequences_on_one_stream_give_what_each_gives_alone(address: str) -> None:
    given = run(
        address,
        """
answers = queue.Queue()
client.start_stream(lambda result, error: answers.put((result, error)))
for i in range(6):
    for sequence in (1, 2, 3):
        client.async_stream_infer("accumulator", [tensor(steps(sequence, 6)[i:i + 1])], sequence_id=sequence,
                                  request_id=f"{sequence}/{i}", sequence_start=i == 0, sequence_end=i == 5)
outputs = {}
for _ in range(18):
    result, error = answers.get(timeout=30)
    assert error is None, error
    outputs[result.get_response().id] = result.as_numpy("y").tolist()
client.stop_stream()
print(json.dumps(outputs))
""",
    )

    for sequence in (1, 2, 3):
        outputs = np.array([given[f"{sequence}/{i}"][0] for i in range(6)], np.float32)
        np.testing.assert_array_equal(outputs, alone(address, steps(sequence, 6)))


def test_the_asyncio_client_runs_many_sequences_at_once(address: str) -> None:
    given = run(
        address,
        """
async def sequence(client, number):
    outputs = []
    for i, step in enumerate(steps(number, 4)):
        result = await client.infer("accumulator", [tensor(step[None], triton_aio)], sequence_id=number,
                                    sequence_start=i == 0, sequence_end=i == 3)
        outputs.append(result.as_numpy("y")[0].tolist())
    return outputs

async def main():
    async with triton_aio.InferenceServerClient(address) as client:
        return await asyncio.gather(*(sequence(client, number) for number in range(1, 17)))

print(json.dumps(asyncio.run(main())))
""",
    )

    for number, outputs in enumerate(given, start=1):
        np.testing.assert_array_equal(np.array(outputs, np.float32), alone(address, steps(number, 4)))


def test_several_steps_of_a_request_its_state_and_a_repeat_are_had_beyond_what_triton_gives(
    address: str,
) -> None:
    given = run(
        address,
        """
inputs = [tensor(steps(0, 8)[None])]
wanted = [triton.InferRequestedOutput("y"), triton.InferRequestedOutput("sum")]
first = client.infer("accumulator", inputs, sequence_id=1, sequence_start=True, outputs=wanted,
                     parameters={"first_step": 0})
again = client.infer("accumulator", inputs, sequence_id=1, outputs=wanted[:1], parameters={"first_step": 0})
rest = client.infer("accumulator", [tensor(steps(1, 1))], sequence_id=1, parameters={"first_step": 8})
print(json.dumps([first.as_numpy("y").tolist(), first.as_numpy("sum").tolist(),
                  again.as_numpy("y").tolist(), rest.as_numpy("y").tolist()]))
""",
    )
    outputs, state, again, rest = (np.array(array, np.float32) for array in given)

    expected = alone(address, np.concatenate([steps(0, 8), steps(1, 1)]))
    np.testing.assert_array_equal(outputs[0], expected[:8])
    np.testing.assert_array_equal(state[0], expected[7])
    np.testing.assert_array_equal(again[0], expected[:8])
    np.testing.assert_array_equal(rest, expected[8:])


def test_a_sequence_begins_from_a_state_given_with_start_and_a_reset_mask_goes_back_to_it(
    address: str,
) -> None:
    given = run(
        address,
        """
state = triton.InferInput("sum", [1, 3], "FP32")
state.set_data_from_numpy(np.array([[4, 8, -2]], np.float32))
def mask(array):
    one = triton.InferInput("reset", list(array.shape), "BOOL")
    one.set_data_from_numpy(array)
    return one
inputs = tensor(np.ones((1, 4, 3), np.float32))
one = tensor(np.ones((1, 3), np.float32))
outputs = [
    client.infer("accumulator", [inputs, state, mask(np.array([[False, False, True, False]]))], sequence_id=1,
                 sequence_start=True),
    client.infer("accumulator", [one], sequence_id=1),
    client.infer("accumulator", [one, mask(np.array([True]))], sequence_id=1),
    client.infer("accumulator", [mask(np.array([[False, True]])), tensor(np.ones((1, 2, 3), np.float32))]),
]
print(json.dumps([result.as_numpy("y").tolist() for result in outputs]))
""",
    )

    def step(state: np.ndarray) -> np.ndarray:
        return np.float32(0.5) * state + np.float32(1)

    begun = np.array([4, 8, -2], np.float32)
    first = step(begun)
    np.testing.assert_array_equal(given[0][0], [first, step(first), first, step(first)])
    np.testing.assert_array_equal(given[1][0], step(step(first)))
    np.testing.assert_array_equal(given[2][0], first)
    np.testing.assert_array_equal(given[3][0], np.ones((2, 3)))


def test_states_and_masks_that_do_not_fit_are_refused_and_the_living_sequence_stays(address: str) -> None:
    given = run(
        address,
        """
def named(name, array, datatype="FP32"):
    one = triton.InferInput(name, list(array.shape), datatype)
    one.set_data_from_numpy(array)
    return one
def refusal(*inputs, **kwargs):
    try:
        client.infer("accumulator", [one, *inputs], sequence_id=1, **kwargs)
    except InferenceServerException as error:
        return error.message()
    return None
one = tensor(np.ones((1, 3), np.float32))
client.infer("accumulator", [one], sequence_id=1, sequence_start=True)
state = np.ones((1, 3), np.float32)
refusals = [
    refusal(named("sum", state)),
    refusal(named("sum", np.ones((1, 4), np.float32)), sequence_start=True),
    refusal(named("sum", np.ones((1, 1, 3), np.float32)), sequence_start=True),
    refusal(named("sum", np.full((1, 3), np.inf, np.float32)), sequence_start=True),
    refusal(named("reset", np.array([[True, False]]), "BOOL")),
    refusal(named("reset", np.ones(1, np.float32))),
    refusal(named("other", state)),
]
rest = client.infer("accumulator", [one], sequence_id=1).as_numpy("y").tolist()
print(json.dumps([refusals, rest]))
""",
    )

    for refusal, said in zip(
        given[0], ("sequence_start", "shape", "axis", "finite", "2 values", "BOOL", "other"), strict=True
    ):
        assert refusal is not None, said
        assert said in refusal
    assert given[1] == [[1.5, 1.5, 1.5]]


def test_a_request_given_up_by_deadline_or_cancellation_is_repeated_and_takes_effect_once(
    address: str,
) -> None:
    given = run(
        address,
        """
def infer(i, **options):
    return client.infer("accumulator", [tensor(steps(0, 3)[i:i + 1])], sequence_id=1, sequence_start=i == 0,
                        parameters={"first_step": i}, **options)

outputs, refusals = [infer(0)], []
for timeout in (-1, 1e-3, 1e-3):  # one whose deadline has passed, and some that may be in time
    try:
        infer(1, client_timeout=timeout)
    except InferenceServerException as error:
        refusals.append(str(error))
outputs.append(infer(1))
answers = queue.Queue()
call = client.async_infer("accumulator", [tensor(steps(0, 3)[2:])], lambda result, error: answers.put(error),
                          sequence_id=1, parameters={"first_step": 2})
call.cancel()
answers.get(timeout=30)  # cancelled, unless the answer was quicker
outputs.append(infer(2))
print(json.dumps([refusals, [result.as_numpy("y")[0].tolist() for result in outputs]]))
""",
    )

    assert given[0]
    assert all("Deadline Exceeded" in refusal for refusal in given[0])
    np.testing.assert_array_equal(np.array(given[1], np.float32), alone(address, steps(0, 3)))


def test_a_request_without_a_sequence_runs_from_the_initial_state_each_time(address: str) -> None:
    given = run(
        address,
        """
step = steps(0, 1)
print(json.dumps([client.infer("accumulator", [tensor(step)]).as_numpy("y").tolist() for _ in range(3)]))
""",
    )

    np.testing.assert_array_equal(np.array(given, np.float32), [steps(0, 1)] * 3)
    with Client(address) as client:
        assert not [*client.sessions()]


def test_a_start_on_a_living_sequence_begins_it_anew_and_what_is_wrong_is_said(address: str) -> None:
    given = run(
        address,
        """
def refusal(*args, **kwargs):
    try:
        client.infer(*args, **kwargs)
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return None

one = [tensor(steps(0, 1))]
client.infer("accumulator", one, sequence_id=1, sequence_start=True)
client.infer("accumulator", one, sequence_id=1)
anew = client.infer("accumulator", one, sequence_id=1, sequence_start=True).as_numpy("y").tolist()
client.infer("accumulator", one, sequence_id=1, sequence_end=True)
rows = triton.InferInput("x", [2, 3], "FP32")
rows.set_data_from_numpy(steps(0, 2))
wrong = triton.InferInput("x", [1, 4], "FP32")
wrong.set_data_from_numpy(np.zeros((1, 4), np.float32))
print(json.dumps({"anew": anew, "refusals": [
    refusal("accumulator", one, sequence_id=1),
    refusal("accumulator", one, sequence_id=2),
    refusal("accumulator", [rows], sequence_id=1, sequence_start=True),
    refusal("accumulator", [wrong], sequence_id=1, sequence_start=True),
    refusal("nowhere", one, sequence_id=1, sequence_start=True),
]}))
""",
    )

    np.testing.assert_array_equal(np.array(given["anew"], np.float32), steps(0, 1))
    codes = [code for code, _ in given["refusals"]]
    assert codes == ["StatusCode.INVALID_ARGUMENT"] * 4 + ["StatusCode.NOT_FOUND"]
    assert "sequence_start" in given["refusals"][0][1]
    assert "rows" in given["refusals"][2][1]


def test_a_sequence_survives_the_servers_death_between_two_requests(
    tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    step_models.write(tmp_path / "models", step_models.accumulator(), "accumulator")
    store = f"sqlite:///{tmp_path}/s.sqlite3"
    first = start_server(tmp_path / "models", store=store)
    run(
        first.address,
        """
client.infer("accumulator", [tensor(steps(0, 3)[None])], sequence_id=5, sequence_start=True)
print("null")
""",
    )
    first.signal(signal.SIGKILL)
    first.wait()
    second = start_server(tmp_path / "models", store=store)

    given = run(
        second.address,
        """
repeat = [client.infer("accumulator", [tensor(steps(1, 1))], sequence_id=5, parameters={"first_step": 3})
          .as_numpy("y").tolist() for _ in range(2)]
print(json.dumps(repeat))
""",
    )

    expected = alone(second.address, np.concatenate([steps(0, 3), steps(1, 1)]))[3:]
    np.testing.assert_array_equal(np.array(given, np.float32), [expected] * 2)
