"""The engine alone: batches that go on, messages that must wait between turns, and what each of them gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import device, spec
from server.engine import BatchReport, Engine, Message
from server.errors import StepFailedError
from server.model_runner import INITIAL_SLOT, ModelRunner
from tests import step_models
from tests.server.helpers import accumulated, random_inputs


class Harness:
    """An engine on one of the small models, and all it reported."""

    def __init__(self, directory: Path, content: bytes, max_batch_size: int) -> None:
        model = spec.load(step_models.write(directory, content), "test", 1)
        self.runner = ModelRunner(model, device.choose("cpu", 0), 64, max_batch_size)
        self.reports: list[BatchReport] = []
        self._ended = threading.Semaphore(0)
        self.engine = Engine(self.runner, lambda ended: self._ended.release(len(ended)), self.reports.append)

    def message(self, number: int, inputs: np.ndarray, slot: int = INITIAL_SLOT) -> Message:
        outputs = np.empty_like(inputs)
        return Message([str(number)], [0], inputs[None], outputs[None], [slot], write_slots=[1 + number])

    def run(self, *messages: Message) -> None:
        """Run messages that arrive together, and wait until all have ended."""
        with self.engine.device_held():
            self.engine.submit(messages)
        for _ in messages:
            assert self._ended.acquire(timeout=30)


def test_a_batch_that_nobody_disturbs_goes_on_and_keeps_its_size(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    messages = [harness.message(number, random_inputs(10, seed=number)) for number in range(3)]

    harness.run(*messages)
    harness.engine.close()

    assert [(report.num_rows, len(report.turn_times_s)) for report in harness.reports] == [(3, 10)]
    for message in messages:
        np.testing.assert_array_equal(message.outputs[0], accumulated(message.inputs[0]))


def test_state_ends_in_the_slot_of_the_message_and_not_before(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    message = harness.message(0, random_inputs(7))

    harness.run(message)
    harness.engine.close()

    assert (message.seats, message.slots) == (None, message.write_slots)
    np.testing.assert_array_equal(
        harness.runner.read(np.array(message.write_slots))["sum"][0], accumulated(message.inputs[0])[-1]
    )


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), size=st.integers(1, 6))
def test_messages_of_any_lengths_in_batches_of_any_size_give_what_each_gives_alone(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int
) -> None:
    """More messages than rows, so that some wait between turns while others run where their state was."""
    harness = Harness(tmp_path_factory.mktemp("models"), step_models.delay_line(), size)
    messages = [harness.message(index, random_inputs(length, index)) for index, length in enumerate(lengths)]

    harness.run(*messages)
    again = [harness.message(30 + i, m.inputs[0], m.write_slots[0]) for i, m in enumerate(messages)]
    harness.run(*again)
    harness.engine.close()

    for first, second in zip(messages, again, strict=True):
        line = np.concatenate([np.zeros((2, 3), np.float32), first.inputs[0], second.inputs[0]])
        np.testing.assert_array_equal(np.concatenate([first.outputs[0], second.outputs[0]]), line[:-2])


def test_a_step_that_fails_amid_a_batch_fails_its_own_message_alone(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.fragile(), max_batch_size=4)
    messages = [harness.message(number, np.full((9, 3), number, np.float32)) for number in range(4)]
    messages[2].inputs[0, 5] = 8

    harness.run(*messages)
    harness.engine.close()

    assert [not message.errors for message in messages] == [True, True, False, True]
    assert type(messages[2].errors[0]) is StepFailedError
    for message in (messages[0], messages[1], messages[3]):
        np.testing.assert_array_equal(message.outputs, 2 * np.cumsum(message.inputs, axis=1))


def test_outputs_that_are_not_finite_fail_their_own_message_at_their_own_step(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.logarithm(), max_batch_size=4)
    messages = [harness.message(number, np.ones((9, 3), np.float32)) for number in range(4)]
    messages[1].inputs[0, 6] = -100

    harness.run(*messages)
    harness.engine.close()

    assert [not message.errors for message in messages] == [True, False, True, True]
    assert "step 6" in str(messages[1].errors[0])


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), num_steps=st.integers(1, 20))
def test_a_message_of_several_sessions_gives_what_each_gives_alone(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_steps: int
) -> None:
    harness = Harness(tmp_path_factory.mktemp("models"), step_models.accumulator(), 6)
    messages = []
    for number, size in enumerate(sizes):
        inputs = np.stack([random_inputs(num_steps, 10 * number + row) for row in range(size)])
        slots = list(range(1 + 5 * number, 1 + 5 * number + size))
        names, first_steps = [f"{number}.{row}" for row in range(size)], [0] * size
        messages.append(
            Message(names, first_steps, inputs, np.empty_like(inputs), [INITIAL_SLOT] * size, slots)
        )

    harness.run(*messages)
    harness.engine.close()

    for message in messages:
        np.testing.assert_array_equal(message.outputs, [accumulated(inputs) for inputs in message.inputs])
        state = harness.runner.read(np.array(message.write_slots))["sum"]
        np.testing.assert_array_equal(state, message.outputs[:, -1])


@pytest.mark.parametrize("make", [step_models.fragile, step_models.logarithm])
def test_in_a_message_of_several_sessions_one_that_fails_fails_alone(
    tmp_path: Path, make: Callable[[], bytes]
) -> None:
    harness = Harness(tmp_path, make(), max_batch_size=4)
    inputs = np.ones((3, 9, 3), np.float32)
    inputs[1, 4] = 8 if make is step_models.fragile else -100
    message = Message(list("abc"), [0] * 3, inputs, np.empty_like(inputs), [INITIAL_SLOT] * 3, [1, 2, 3])

    harness.run(message)
    harness.engine.close()

    assert [*message.errors] == [1]
    alone = Harness(tmp_path / "alone", make(), max_batch_size=4)
    other = alone.message(0, inputs[0])
    alone.run(other)
    alone.engine.close()
    np.testing.assert_array_equal(message.outputs[[0, 2]], [other.outputs[0]] * 2)
