"""The engine alone: batches that go on, messages that must wait between turns, and what each of them gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.engine import BatchReport, Engine
from server.engine.request import Message
from server.errors import OutputNotFiniteError, StepFailedError
from server.model import spec
from server.runtime import provider as device
from server.runtime.probe import load_runner
from server.runtime.runner import INITIAL_SLOT
from server.runtime.slots import SlotPool
from server.runtime.state_cache import StateCache
from tests import step_models
from tests.server.helpers import accumulated, random_inputs


class Harness:
    """An engine on one of the small models, and all it reported."""

    def __init__(self, directory: Path, content: bytes, max_batch_size: int) -> None:
        model = spec.load(step_models.write(directory, content), "test", 1)
        self.runner = load_runner(model, device.choose("cpu", 0), 64, max_batch_size)
        self.reports: list[BatchReport] = []
        self._ended = threading.Semaphore(0)
        self.engine = Engine(self.runner, lambda ended: self._ended.release(len(ended)), self.reports.append)

    def message(self, number: int, inputs: np.ndarray, slot: int = INITIAL_SLOT) -> Message:
        outputs = np.empty_like(inputs)
        return Message([str(number)], [0], inputs[None], outputs[None], [slot], write_slots=[1 + number])

    def state(self, slots: list[int]) -> dict[str, np.ndarray]:
        """The state in some slots, asked for as a caller does: by a message of no steps."""
        nothing = np.empty((len(slots), 0, 3), np.float32)
        look = Message([""] * len(slots), [0] * len(slots), nothing, nothing, slots, slots, wants_state=True)
        self.run(look)
        assert look.state is not None
        return look.state

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


@pytest.mark.parametrize(("quantum_s", "most"), [(1e-9, 1), (1e9, 32)])
def test_those_who_wait_take_turns_of_a_quantum_each(
    quantum_s: float, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two messages and a single row: neither is held up for longer than the other's quantum."""
    monkeypatch.setattr("server.engine.engine._QUANTUM_S", quantum_s)
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=1)
    harness.run(harness.message(5, random_inputs(1)))  # from now on it is known how long a turn takes
    messages = [harness.message(number, random_inputs(96, seed=number)) for number in range(2)]

    harness.run(*messages)
    harness.engine.close()

    assert [len(report.turn_times_s) for report in harness.reports[1:]] == [most] * (2 * 96 // most)
    for message in messages:
        np.testing.assert_array_equal(message.outputs[0], accumulated(message.inputs[0]))


def test_who_arrives_amid_the_turns_of_another_waits_for_the_end_of_its_quantum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=1)
    monkeypatch.setattr(harness.engine, "_turns_in_a_quantum", lambda num_rows: 4)
    first, second = harness.message(0, random_inputs(20)), harness.message(1, random_inputs(1))
    run, num_runs = harness.runner.run, 0

    def run_amid_an_arrival(inputs: np.ndarray, table: int) -> np.ndarray:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 2:
            harness.engine.submit([second])
        return run(inputs, table)

    monkeypatch.setattr(harness.runner, "run", run_amid_an_arrival)
    harness.run(first)
    assert harness._ended.acquire(timeout=30)
    harness.engine.close()

    assert [len(report.turn_times_s) for report in harness.reports] == [8, 1, 12]
    np.testing.assert_array_equal(first.outputs[0], accumulated(first.inputs[0]))


@pytest.mark.parametrize(
    ("turn_times_s", "num_rows"),
    [
        ({4: 1.0e-4, 2: 0.51e-4}, [2, 2]),
        ({4: 1.0e-4, 2: 0.9e-4}, [4]),  # two halves take much longer than one batch
        ({4: 2e-6, 2: 1e-6}, [4]),  # answering takes longer than a run
        ({}, [4]),
    ],
)
def test_a_batch_is_halved_where_one_half_can_be_answered_while_the_other_runs_and_that_is_worth_it(
    turn_times_s: dict[int, float], num_rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.runtime.probe.measure_turns", lambda _: turn_times_s)
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)

    harness.run(*(harness.message(number, random_inputs(32, seed=number)) for number in range(4)))
    harness.engine.close()

    assert [report.num_rows for report in harness.reports] == num_rows


def test_a_quantum_of_as_many_rows_as_never_ran_is_guessed_from_the_most_similar_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.runtime.probe.measure_turns", lambda _: {4: 1e-3, 2: 5e-4})
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    harness.engine.close()

    assert [harness.engine._turns_in_a_quantum(num_rows) for num_rows in (1, 2, 4, 8)] == [8, 8, 4, 2]


def test_state_ends_in_the_slot_of_the_message_and_not_before(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    message = harness.message(0, random_inputs(7))

    harness.run(message)

    np.testing.assert_array_equal(
        harness.state(message.write_slots)["sum"][0], accumulated(message.inputs[0])[-1]
    )
    harness.engine.close()


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

    for message in messages:
        np.testing.assert_array_equal(message.outputs, [accumulated(inputs) for inputs in message.inputs])
        np.testing.assert_array_equal(harness.state(message.write_slots)["sum"], message.outputs[:, -1])
    harness.engine.close()


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


def test_a_message_goes_without_the_session_that_is_taken_out_of_it_before_its_first_turn(
    tmp_path: Path,
) -> None:
    harness = Harness(tmp_path, step_models.logarithm(), max_batch_size=4)
    inputs = np.ones((3, 9, 3), np.float32)
    inputs[2, 4] = -100
    message = Message(list("abc"), [0, 10, 20], inputs, np.empty_like(inputs), [INITIAL_SLOT] * 3, [1, 2, 3])

    with harness.engine.device_held():
        harness.engine.submit([message])
        assert harness.engine.leave_out(message, 1)
    harness.engine.close()

    assert not harness.engine.leave_out(message, 0), "it has begun"
    assert [*message.session_ids] == ["a", "c"]
    assert [*message.write_slots] == [1, 3]
    assert {row: str(error) for row, error in message.errors.items()} == {
        1: str(OutputNotFiniteError("test/1", 24))
    }
    np.testing.assert_allclose(message.outputs[0, :, 0], np.log(np.arange(2, 11)), rtol=1e-6)


def test_sessions_that_go_on_in_the_same_company_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    inputs = [random_inputs(6, seed=number) for number in range(3)]
    slots = [[1, 11], [2, 12], [3, 13]]
    harness.run(*(harness.message(number, inputs[number][:1]) for number in range(3)))
    moves: list[int] = []
    move = harness.runner.move
    monkeypatch.setattr(harness.runner, "move", lambda a, b: (moves.append(len(a)), move(a, b)))

    for step in range(1, 6):
        messages = [
            Message(
                [""],
                [step],
                inputs[n][None, step : step + 1],
                np.empty((1, 1, 3), np.float32),
                [read],
                [write],
            )
            for n, (read, write) in enumerate(slots)
        ]
        harness.run(*messages)
        slots = [[write, read] for read, write in slots]
        for n, message in enumerate(messages):
            np.testing.assert_array_equal(message.outputs[0, 0], accumulated(inputs[n])[step])

    harness.engine.close()
    assert moves == []


def test_companies_that_take_turns_are_not_copied_as_long_as_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=2)
    companies = [[1, 2], [3, 4], [5, 6]]
    inputs = random_inputs(4)
    moves: list[int] = []
    move = harness.runner.move
    monkeypatch.setattr(harness.runner, "move", lambda a, b: (moves.append(len(a)), move(a, b)))

    for step in range(4):
        for slots in companies:
            present = [slot + 10 * step for slot in slots] if step else [INITIAL_SLOT] * 2
            step_inputs = np.broadcast_to(inputs[step], (2, 1, 3))
            outputs = np.empty((2, 1, 3), np.float32)
            write = [slot + 10 * (step + 1) for slot in slots]
            harness.run(Message(["a", "b"], [step] * 2, step_inputs, outputs, present, write))
            np.testing.assert_array_equal(outputs[:, 0], [accumulated(inputs)[step]] * 2)

    harness.engine.close()
    assert moves == [2] * len(companies)  # each to its table, once


# A session's life in the engine: a step or several, alone or with others, one that fails, a fork, an end.
lives = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "fail", "fork", "reset"]),
        st.sets(st.integers(0, 5), min_size=1, max_size=6),
        st.integers(1, 3),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(lives=lives, max_batch_size=st.integers(1, 6))
def test_every_slot_has_the_state_it_should_whatever_happened_to_others(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[str, set[int], int]], max_batch_size: int
) -> None:
    """Slots are taken and released as sessions do it, the last released first, so that they change hands at once."""
    harness = Harness(tmp_path_factory.mktemp("models"), step_models.logarithm(), max_batch_size)
    pool = SlotPool(63)
    slot_of = [INITIAL_SLOT] * 6
    expected = [np.ones(3, np.float32)] * 6
    randomness = np.random.default_rng(0)

    for what, sessions, num_steps in lives:
        if what == "reset":
            for session in sessions:
                pool.release(slot_of[session])
                slot_of[session], expected[session] = INITIAL_SLOT, np.ones(3, np.float32)
            continue
        if what == "fork":
            source = min(sessions)
            for session in sessions - {source}:
                pool.release(slot_of[session])
                slot_of[session], expected[session] = pool.hold(slot_of[source]), expected[source]
            continue
        messages = []
        for session in sorted(sessions):
            inputs = randomness.uniform(0.5, 1, (1, num_steps, 3)).astype(np.float32)
            if what == "fail" and session == max(sessions):
                inputs[0, -1] = -1000
            slot = slot_of[session]
            messages.append(
                Message([""], [0], inputs, np.empty_like(inputs), [slot], [pool.take()], pool.shared(slot))
            )
        harness.run(*messages)
        for session, message in zip(sorted(sessions), messages, strict=True):
            assert bool(message.errors) == (what == "fail" and session == max(sessions))
            if message.errors:
                pool.release(message.write_slots[0])
                continue
            pool.release(slot_of[session])
            slot_of[session] = message.write_slots[0]
            expected[session] = expected[session] + message.inputs[0].sum(0)

    for session in range(6):
        np.testing.assert_allclose(
            harness.state([slot_of[session]])["sum"][0], expected[session], rtol=1e-5, err_msg=str(session)
        )
    harness.engine.close()


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=5, max_size=20),
    size=st.integers(2, 5),
)
def test_messages_that_arrive_amid_the_turns_of_others_give_what_each_gives_alone(
    tmp_path_factory: pytest.TempPathFactory, arrivals: list[tuple[int, int]], size: int
) -> None:
    """Each arrives at a run of its own and cuts short what is under way, so that states lodge in every order.

    A message of no steps takes a place in a batch and no seat, so that others stay where they were while they wait.
    """
    harness = Harness(tmp_path_factory.mktemp("models"), step_models.accumulator(), size)
    messages = [harness.message(n, random_inputs(length, n)) for n, (_, length) in enumerate(arrivals)]
    run, num_runs = harness.runner.run, 0

    def run_amid_arrivals(inputs: np.ndarray, table: int) -> np.ndarray:
        nonlocal num_runs
        num_runs += 1
        outputs = run(inputs, table)
        arriving = [m for m, (at, _) in zip(messages, arrivals, strict=True) if at == num_runs]
        if arriving:
            harness.engine.submit(arriving)
        return outputs

    harness.runner.run = run_amid_arrivals  # type: ignore[method-assign]
    with harness.engine.device_held():
        harness.engine.submit([m for m, (at, _) in zip(messages, arrivals, strict=True) if at == 0])
    num_ended = 0
    while num_ended < len(messages):
        if harness._ended.acquire(timeout=0.05):
            num_ended += 1
        else:  # whoever was to arrive later arrives now, since nobody runs
            num_runs += 1
            harness.engine.submit(
                [m for m, (at, _) in zip(messages, arrivals, strict=True) if at == num_runs]
            )
    harness.engine.close()

    for message in messages:
        expected = accumulated(message.inputs[0]).reshape(-1, 3)
        np.testing.assert_array_equal(message.outputs[0], expected)


class Rows:
    """One table and a spare area, and which slot's state is in each row: enough of a runner for lodgers."""

    num_rows, padded_batch_size = 30, None

    def __init__(self) -> None:
        self.firsts = [10, 20]
        self.content: dict[int, str] = {}

    def first_seat(self, table: int) -> int:
        return self.firsts[table]

    @property
    def spare_first_seat(self) -> int:
        return self.firsts[1]

    def run(self, seats: dict[int, str]) -> None:
        """What a run leaves, by seat."""
        self.content |= {self.spare_first_seat + seat: state for seat, state in seats.items()}
        self.firsts.reverse()

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        states = [self.content[int(row)] for row in sources]
        self.content |= dict(zip(targets.tolist(), states, strict=True))


def test_a_state_that_lodges_anew_is_not_overwritten_by_what_it_was_before() -> None:
    """A message stood up, took its seat again for a single turn, and stood up: its old state must not come back."""
    rows: Any = Rows()
    lodgers, seat, slot = StateCache(rows), 2, np.array([5])
    rows.run({seat: "before"})
    lodgers.add(rows.first_seat(0) + np.array([seat]), slot)
    assert lodgers.rows_of(slot) == rows.first_seat(0) + seat

    rows.run({seat: "after"})
    lodgers.add(rows.first_seat(0) + np.array([seat]), slot)
    lodgers.make_room_for_run(0, 4)
    rows.run({0: "others", 1: "others", 2: "others", 3: "others"})

    assert rows.content[int(lodgers.rows_of(slot)[0])] == "after"
