"""The engine alone: batches that go on, requests that must wait between turns, and what each of them gives."""

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
from server.engine.request import NO_SLOTS, EngineRequest
from server.errors import StepFailedError
from server.model import spec
from server.model.spec import StepModel
from server.runtime import provider as device
from server.runtime.probe import load_runner
from server.runtime.runner import INITIAL_SLOT
from server.runtime.slots import SlotPool
from server.runtime.state_cache import StateCache
from tests import step_models
from tests.server.helpers import accumulated, random_inputs


class Request(EngineRequest):
    """A request whose inputs and outputs are arrays of the small models' one tensor."""

    def __init__(
        self,
        model: StepModel,
        session_ids: list[str],
        first_steps: list[int],
        values: np.ndarray,
        slots: list[int],
        write_slots: list[int],
        shared_slots: frozenset[int] = NO_SLOTS,
        reads_state: bool = False,
    ) -> None:
        inputs = model.inputs.pack({model.inputs.names[0]: values})
        super().__init__(
            session_ids, first_steps, inputs, slots, write_slots, shared_slots, None, reads_state
        )
        self.model, self.values = model, values

    @property
    def given(self) -> np.ndarray:
        """Outputs [S, T, 3]."""
        if self.outputs is None:
            return np.empty((*self.inputs.shape, 3), np.float32)
        return self.model.outputs.tensor(self.outputs, self.model.outputs.names[0])


class Harness:
    """An engine on one of the small models, and all it reported."""

    def __init__(self, directory: Path, content: bytes, max_batch_size: int) -> None:
        model = spec.load(step_models.write(directory, content), "test", 1)
        self.runner = load_runner(model, device.choose("cpu", 0), 64, max_batch_size)
        self.reports: list[BatchReport] = []
        self.ended = threading.Semaphore(0)
        self.engine = Engine(self.runner, lambda ended: self.ended.release(len(ended)), self.reports.append)

    def request(self, number: int, inputs: np.ndarray, slot: int = INITIAL_SLOT) -> Request:
        return self.requests([str(number)], [0], inputs[None], [slot], [1 + number])

    def requests(self, *args: Any, **kwargs: Any) -> Request:
        return Request(self.runner.model, *args, **kwargs)

    def state(self, slots: list[int]) -> dict[str, np.ndarray]:
        """The state in some slots, asked for as a caller does: by a request of no steps."""
        nothing = np.empty((len(slots), 0, 3), np.float32)
        look = self.requests([""] * len(slots), [0] * len(slots), nothing, slots, slots, reads_state=True)
        self.run(look)
        assert look.state is not None
        return look.state

    def run(self, *requests: Request) -> None:
        """Run requests that arrive together, and wait until all have ended."""
        with self.engine.device_held():
            self.engine.submit(requests)
        for _ in requests:
            assert self.ended.acquire(timeout=30)


def test_a_batch_that_nobody_disturbs_goes_on_and_keeps_its_size(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    requests = [harness.request(number, random_inputs(10, seed=number)) for number in range(3)]

    harness.run(*requests)
    harness.engine.close()

    assert [(report.num_rows, len(report.turn_times_s)) for report in harness.reports] == [(3, 10)]
    for request in requests:
        np.testing.assert_array_equal(request.given[0], accumulated(request.values[0]))


@pytest.mark.parametrize(("quantum_s", "most"), [(1e-9, 1), (1e9, 32)])
def test_those_who_wait_take_turns_of_a_quantum_each(
    quantum_s: float, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests and a single row: neither is held up for longer than the other's quantum."""
    monkeypatch.setattr("server.engine.engine._QUANTUM_S", quantum_s)
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=1)
    harness.run(harness.request(5, random_inputs(1)))  # from now on it is known how long a turn takes
    requests = [harness.request(number, random_inputs(96, seed=number)) for number in range(2)]

    harness.run(*requests)
    harness.engine.close()

    turns = [len(report.turn_times_s) for report in harness.reports[1:]]
    assert sum(turns) == 2 * 96
    assert turns[: 128 // most] == [most] * (128 // most), "as long as both wait"
    for request in requests:
        np.testing.assert_array_equal(request.given[0], accumulated(request.values[0]))


def test_who_arrives_amid_the_turns_of_another_waits_for_the_end_of_its_quantum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=1)
    monkeypatch.setattr(harness.engine, "_turns_in_a_quantum", lambda num_rows: 4)
    first, second = harness.request(0, random_inputs(20)), harness.request(1, random_inputs(1))
    run, num_runs = harness.runner.run, 0

    def run_amid_an_arrival(*args: object, **named: object) -> np.ndarray:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 2:
            harness.engine.submit([second])
        return run(*args, **named)

    monkeypatch.setattr(harness.runner, "run", run_amid_an_arrival)
    harness.run(first)
    assert harness.ended.acquire(timeout=30)
    harness.engine.close()

    assert [len(report.turn_times_s) for report in harness.reports] == [8, 1, 12]
    np.testing.assert_array_equal(first.given[0], accumulated(first.values[0]))


def test_a_quantum_of_as_many_rows_as_never_ran_is_guessed_from_the_most_similar_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    harness.engine.close()
    monkeypatch.setattr(harness.engine, "_turn_time_s", {4: 1e-3, 2: 5e-4})

    assert [harness.engine._turns_in_a_quantum(num_rows) for num_rows in (1, 2, 4, 8)] == [8, 8, 4, 2]


def test_state_ends_in_the_slot_of_the_request_and_not_before(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    request = harness.request(0, random_inputs(7))

    harness.run(request)

    np.testing.assert_array_equal(
        harness.state(request.write_slots)["sum"][0], accumulated(request.values[0])[-1]
    )
    harness.engine.close()


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), size=st.integers(1, 6))
def test_requests_of_any_lengths_in_batches_of_any_size_give_what_each_gives_alone(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int
) -> None:
    """More requests than rows, so that some wait between turns while others run where their state was."""
    harness = Harness(tmp_path_factory.mktemp("models"), step_models.delay_line(), size)
    requests = [harness.request(index, random_inputs(length, index)) for index, length in enumerate(lengths)]

    harness.run(*requests)
    again = [harness.request(30 + i, m.values[0], m.write_slots[0]) for i, m in enumerate(requests)]
    harness.run(*again)
    harness.engine.close()

    for first, second in zip(requests, again, strict=True):
        line = np.concatenate([np.zeros((2, 3), np.float32), first.values[0], second.values[0]])
        np.testing.assert_array_equal(np.concatenate([first.given[0], second.given[0]]), line[:-2])


def test_a_step_that_fails_amid_a_batch_fails_its_own_request_alone(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.fragile(), max_batch_size=4)
    inputs = np.repeat(np.arange(4, dtype=np.float32), 27).reshape(4, 9, 3)
    inputs[2, 5] = 8
    requests = [harness.request(number, inputs[number]) for number in range(4)]

    harness.run(*requests)
    harness.engine.close()

    assert [not request.errors for request in requests] == [True, True, False, True]
    assert type(requests[2].errors[0]) is StepFailedError
    for request in (requests[0], requests[1], requests[3]):
        np.testing.assert_array_equal(request.given, 2 * np.cumsum(request.values, axis=1))


def test_outputs_that_are_not_finite_fail_their_own_request_at_their_own_step(tmp_path: Path) -> None:
    harness = Harness(tmp_path, step_models.logarithm(), max_batch_size=4)
    inputs = np.ones((4, 9, 3), np.float32)
    inputs[1, 6] = -100
    requests = [harness.request(number, inputs[number]) for number in range(4)]

    harness.run(*requests)
    harness.engine.close()

    assert [not request.errors for request in requests] == [True, False, True, True]
    assert "step 6" in str(requests[1].errors[0])


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), num_steps=st.integers(1, 20))
def test_a_request_of_several_sessions_gives_what_each_gives_alone(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_steps: int
) -> None:
    harness = Harness(tmp_path_factory.mktemp("models"), step_models.accumulator(), 6)
    requests = []
    for number, size in enumerate(sizes):
        inputs = np.stack([random_inputs(num_steps, 10 * number + row) for row in range(size)])
        slots = list(range(1 + 5 * number, 1 + 5 * number + size))
        names, first_steps = [f"{number}.{row}" for row in range(size)], [0] * size
        requests.append(harness.requests(names, first_steps, inputs, [INITIAL_SLOT] * size, slots))

    harness.run(*requests)

    for request in requests:
        np.testing.assert_array_equal(request.given, [accumulated(inputs) for inputs in request.values])
        np.testing.assert_array_equal(harness.state(request.write_slots)["sum"], request.given[:, -1])
    harness.engine.close()


@pytest.mark.parametrize("make", [step_models.fragile, step_models.logarithm])
def test_in_a_request_of_several_sessions_one_that_fails_fails_alone(
    tmp_path: Path, make: Callable[[], bytes]
) -> None:
    harness = Harness(tmp_path, make(), max_batch_size=4)
    inputs = np.ones((3, 9, 3), np.float32)
    inputs[1, 4] = 8 if make is step_models.fragile else -100
    request = harness.requests(list("abc"), [0] * 3, inputs, [INITIAL_SLOT] * 3, [1, 2, 3])

    harness.run(request)
    harness.engine.close()

    assert [*request.errors] == [1]
    alone = Harness(tmp_path / "alone", make(), max_batch_size=4)
    other = alone.request(0, inputs[0])
    alone.run(other)
    alone.engine.close()
    np.testing.assert_array_equal(request.given[[0, 2]], [other.given[0]] * 2)


def test_sessions_that_go_on_in_the_same_batch_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=4)
    inputs = [random_inputs(6, seed=number) for number in range(3)]
    slots = [[1, 11], [2, 12], [3, 13]]
    harness.run(*(harness.request(number, inputs[number][:1]) for number in range(3)))
    moves: list[int] = []
    move = harness.runner.move
    monkeypatch.setattr(harness.runner, "move", lambda a, b: (moves.append(len(a)), move(a, b)))

    for step in range(1, 6):
        requests = [
            harness.requests(
                [""],
                [step],
                inputs[n][None, step : step + 1],
                [read],
                [write],
            )
            for n, (read, write) in enumerate(slots)
        ]
        harness.run(*requests)
        slots = [[write, read] for read, write in slots]
        for n, request in enumerate(requests):
            np.testing.assert_array_equal(request.given[0, 0], accumulated(inputs[n])[step])

    harness.engine.close()
    assert moves == []


def test_batches_that_take_turns_are_not_copied_as_long_as_there_are_banks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(tmp_path, step_models.accumulator(), max_batch_size=2)
    batches_of_slots = [[1, 2], [3, 4], [5, 6]]
    inputs = random_inputs(4)
    moves: list[int] = []
    move = harness.runner.move
    monkeypatch.setattr(harness.runner, "move", lambda a, b: (moves.append(len(a)), move(a, b)))

    for step in range(4):
        for slots in batches_of_slots:
            present = [slot + 10 * step for slot in slots] if step else [INITIAL_SLOT] * 2
            step_inputs = np.broadcast_to(inputs[step], (2, 1, 3))
            write = [slot + 10 * (step + 1) for slot in slots]
            request = harness.requests(["a", "b"], [step] * 2, step_inputs, present, write)
            harness.run(request)
            np.testing.assert_array_equal(request.given[:, 0], [accumulated(inputs)[step]] * 2)

    harness.engine.close()
    assert moves == [2] * len(batches_of_slots)  # each to its bank, once


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
        requests = []
        for session in sorted(sessions):
            inputs = randomness.uniform(0.5, 1, (1, num_steps, 3)).astype(np.float32)
            if what == "fail" and session == max(sessions):
                inputs[0, -1] = -1000
            slot = slot_of[session]
            requests.append(harness.requests([""], [0], inputs, [slot], [pool.take()], pool.shared(slot)))
        harness.run(*requests)
        for session, request in zip(sorted(sessions), requests, strict=True):
            assert bool(request.errors) == (what == "fail" and session == max(sessions))
            if request.errors:
                pool.release(request.write_slots[0])
                continue
            pool.release(slot_of[session])
            slot_of[session] = request.write_slots[0]
            expected[session] = expected[session] + request.values[0].sum(0)

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
def test_requests_that_arrive_amid_the_turns_of_others_give_what_each_gives_alone(
    tmp_path_factory: pytest.TempPathFactory, arrivals: list[tuple[int, int]], size: int
) -> None:
    """Each arrives at a run of its own and cuts short what is under way, so that states are cached in every order.

    A request of no steps takes no row of a batch, so that others stay where they were while they wait.
    """
    harness = Harness(tmp_path_factory.mktemp("models"), step_models.accumulator(), size)
    requests = [harness.request(n, random_inputs(length, n)) for n, (_, length) in enumerate(arrivals)]
    run, num_runs = harness.runner.run, 0

    def run_amid_arrivals(*args: object, **named: object) -> np.ndarray:
        nonlocal num_runs
        num_runs += 1
        outputs = run(*args, **named)
        arriving = [m for m, (at, _) in zip(requests, arrivals, strict=True) if at == num_runs]
        if arriving:
            harness.engine.submit(arriving)
        return outputs

    harness.runner.run = run_amid_arrivals  # type: ignore[method-assign]
    with harness.engine.device_held():
        harness.engine.submit([m for m, (at, _) in zip(requests, arrivals, strict=True) if at == 0])
    num_ended = 0
    while num_ended < len(requests):
        if harness.ended.acquire(timeout=0.05):
            num_ended += 1
        else:  # whoever was to arrive later arrives now, since nobody runs
            num_runs += 1
            harness.engine.submit(
                [m for m, (at, _) in zip(requests, arrivals, strict=True) if at == num_runs]
            )
    harness.engine.close()

    for request in requests:
        expected = accumulated(request.values[0]).reshape(-1, 3)
        np.testing.assert_array_equal(request.given[0], expected)


class Rows:
    """One bank and a spare buffer, and which slot's state is in each row: enough of a runner for cache."""

    num_rows, padded_batch_size = 30, None

    def __init__(self) -> None:
        self.firsts = [10, 20]
        self.content: dict[int, str] = {}

    def first_batch_row(self, bank: int) -> int:
        return self.firsts[bank]

    @property
    def spare_first_row(self) -> int:
        return self.firsts[1]

    def run(self, batch_rows: dict[int, str]) -> None:
        """What a run leaves, by batch_row."""
        self.content |= {self.spare_first_row + batch_row: state for batch_row, state in batch_rows.items()}
        self.firsts.reverse()

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        states = [self.content[int(row)] for row in sources]
        self.content |= dict(zip(targets.tolist(), states, strict=True))


def test_a_state_that_is_cached_anew_is_not_overwritten_by_what_it_was_before() -> None:
    """A request left its batch row, took it again for a single turn, and left: its old state must not come back."""
    rows: Any = Rows()
    cache, batch_row, slot = StateCache(rows), 2, np.array([5])
    rows.run({batch_row: "before"})
    cache.add(rows.first_batch_row(0) + np.array([batch_row]), slot)
    assert cache.rows_of(slot) == rows.first_batch_row(0) + batch_row

    rows.run({batch_row: "after"})
    cache.add(rows.first_batch_row(0) + np.array([batch_row]), slot)
    cache.make_room_for_run(0, 4)
    rows.run({0: "others", 1: "others", 2: "others", 3: "others"})

    assert rows.content[int(cache.rows_of(slot)[0])] == "after"
