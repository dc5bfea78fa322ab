"""The model runner alone: pools, padding, and what is measured at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from structlog.testing import capture_logs

from ntm.v1 import model_pb2
from server.model import spec
from server.runtime import graphs
from server.runtime import provider as device
from server.runtime.probe import load_runner
from server.runtime.runner import INITIAL_SLOT, NUM_RESERVED_SLOTS, ModelRunner
from tests import step_models

MODELS = Path(__file__).parents[3] / "models"


def runner_of(tmp_path: Path, content: bytes, kind: device.RequestedDevice = "cpu") -> ModelRunner:
    model = spec.load(step_models.write(tmp_path, content), "test", 1)
    return load_runner(model, device.choose(kind, 0), num_slots=16, max_batch_size=8)


def steps(runner: ModelRunner, slots: list[int], inputs: np.ndarray) -> np.ndarray:
    """One step of some slots, in place."""
    outputs = sit_and_run(runner, slots, inputs)
    runner.move(runner.first_batch_row(0) + np.arange(len(slots)), np.array(slots))
    return outputs


def run(
    runner: ModelRunner, inputs: np.ndarray, initial_rows: np.ndarray | None = None, resets: object = None
) -> np.ndarray:
    """Steps [K, B, ...] of x at the first bank; returns y, a copy."""
    model = runner.model
    steps = model.inputs.pack({"x": inputs}, None if resets is None else np.asarray(resets))
    return model.outputs.unpack(runner.run(steps, 0, initial_rows))["y"].copy()


def sit_and_run(runner: ModelRunner, slots: list[int], inputs: np.ndarray) -> np.ndarray:
    runner.move(np.array(slots), runner.first_batch_row(0) + np.arange(len(slots)))
    return run(runner, inputs[np.newaxis])[0]


def test_a_move_writes_the_slots_named_and_no_others(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.accumulator())
    every_slot = np.arange(16 + NUM_RESERVED_SLOTS)
    before = runner.read(every_slot)["sum"]
    inputs = np.ones((2, 3), np.float32)

    sit_and_run(runner, [INITIAL_SLOT, 4], inputs)
    runner.move(runner.first_batch_row(0) + np.arange(2), np.array([7, 9]))

    expected = before.copy()
    expected[7] = 1
    expected[9] = np.float32(0.5) * before[4] + 1
    np.testing.assert_array_equal(runner.read(every_slot)["sum"], expected)


def test_a_run_changes_no_slot(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.many_layouts())
    before = runner.read(np.arange(16))

    sit_and_run(runner, [3, 4, 5], np.ones((3, 3), np.float32))

    for name, value in runner.read(np.arange(16)).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("seed", range(5))
def test_states_that_do_not_depend_on_themselves_are_not_overwritten_before_they_are_read(
    tmp_path: Path, seed: int
) -> None:
    """A delay line in place, many slots in random batches: as one graph this went wrong in half of the tries."""
    runner = runner_of(tmp_path, step_models.delay_line())
    generator = np.random.default_rng(seed)
    lines = {slot: [np.zeros(3, np.float32)] * 2 for slot in range(2, 18)}
    runner.write(np.array([*lines]), {name: np.zeros((16, 3), np.float32) for name in ("a", "b")})
    for _ in range(60):
        slots = generator.permutation(16)[: generator.integers(1, 9)] + 2
        inputs = generator.uniform(-1, 1, (len(slots), 3)).astype(np.float32)

        outputs = steps(runner, slots.tolist(), inputs)

        for slot, row, output in zip(slots.tolist(), inputs, outputs, strict=True):
            lines[slot].append(row)
            np.testing.assert_array_equal(output, lines[slot].pop(0))


def test_a_step_whose_results_depend_on_the_batchs_size_is_padded_to_one_size(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.size_dependent())
    inputs = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)

    together = sit_and_run(runner, [INITIAL_SLOT] * 5, inputs)
    alone = np.concatenate([sit_and_run(runner, [INITIAL_SLOT], row[None]) for row in inputs])

    assert runner.is_batch_invariant
    np.testing.assert_array_equal(together, alone)


def test_how_long_a_turn_takes_is_measured_for_the_largest_batch_and_half_of_it(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.accumulator())

    assert {*runner.turn_times_s} == {1, runner.max_batch_size, runner.max_batch_size // 2}
    assert all(time_s > 0 for time_s in runner.turn_times_s.values())


def test_a_step_that_fails_on_random_inputs_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_nothing(self: ModelRunner, inputs: np.ndarray, bank: int = 0) -> np.ndarray:
        raise RuntimeError("zero divide")

    monkeypatch.setattr(ModelRunner, "run", run_nothing)

    assert runner_of(tmp_path, step_models.accumulator()).turn_times_s == {}


def test_a_batch_goes_on_from_where_the_last_run_left_it(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.delay_line())
    inputs = np.random.default_rng(1).uniform(-1, 1, (6, 4, 3)).astype(np.float32)
    runner.move(np.full(4, INITIAL_SLOT), runner.first_batch_row(0) + np.arange(4))

    outputs = np.concatenate(
        [run(runner, inputs[turns]) for turns in (slice(0, 1), slice(1, 5), slice(5, 6))]
    )

    np.testing.assert_array_equal(outputs, [np.zeros((4, 3)), np.zeros((4, 3)), *inputs[:-2]])


def test_steps_at_once_give_what_one_after_the_other_does_bit_for_bit(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.many_layouts())
    assert runner.can_scan
    inputs = np.random.default_rng(2).uniform(-1, 1, (7, 5, 3)).astype(np.float32)
    results = []
    for cuts in ([0, 7], range(8), [0, 1, 3, 7]):
        runner.move(np.full(5, INITIAL_SLOT), runner.first_batch_row(0) + np.arange(5))
        pieces = [inputs[start:stop] for start, stop in pairwise(cuts)]
        outputs = np.concatenate([run(runner, piece) for piece in pieces])
        results.append({"y": outputs, **runner.read(runner.first_batch_row(0) + np.arange(5))})

    for other in results[1:]:
        for name, value in other.items():
            np.testing.assert_array_equal(value, results[0][name])


def test_what_runs_are_bound_to_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.runtime.runner._MOST_BOUND_BYTES", 1000)
    runner = runner_of(tmp_path, step_models.accumulator())
    inputs = np.ones((4, 8, 3), np.float32)
    runner.move(np.full(8, INITIAL_SLOT), runner.first_batch_row(0) + np.arange(8))

    for num_steps, num_rows in [(1, 1), (4, 4), (4, 8), (2, 8), (1, 1)]:
        outputs = run(runner, np.ascontiguousarray(inputs[:num_steps, :num_rows]))

    assert len(runner._steps) == len(runner._runs) == 2
    np.testing.assert_array_equal(outputs[0, 0], np.full(3, sum(0.5**n for n in range(12))))


@pytest.mark.parametrize(
    "make", [step_models.delay_line, step_models.many_layouts, step_models.size_dependent]
)
@pytest.mark.parametrize("seed", range(4))
def test_steps_that_are_reset_begin_from_the_rows_that_each_session_names(
    tmp_path: Path, make: Callable[[], bytes], seed: int
) -> None:
    runner = runner_of(tmp_path, make())
    generator = np.random.default_rng(seed)
    for _ in range(4):
        num_steps, num_rows = int(generator.integers(1, 12)), int(generator.integers(1, 9))
        inputs = generator.uniform(-1, 1, (num_steps, num_rows, 3)).astype(np.float32)
        resets = generator.random((num_steps, num_rows)) < 0.2
        resets[generator.integers(num_steps), 0] = True
        initial_rows = generator.integers(0, 5, num_rows)
        expected = np.empty_like(inputs)
        alone = {}
        for row in range(num_rows):
            runner.move(np.array([row + 5]), np.array([runner.first_batch_row(0)]))
            for step in range(num_steps):
                if resets[step, row]:
                    runner.move(initial_rows[[row]], np.array([runner.first_batch_row(0)]))
                expected[step, row] = run(runner, inputs[step : step + 1, row : row + 1])[0, 0]
            alone[row] = runner.read(np.array([runner.first_batch_row(0)]))
        batch_rows = np.arange(num_rows)
        runner.move(batch_rows + 5, runner.first_batch_row(0) + batch_rows)

        outputs = run(runner, inputs, initial_rows, resets)

        np.testing.assert_array_equal(outputs, expected)
        after = runner.read(runner.first_batch_row(0) + batch_rows)
        for row, state in alone.items():
            for name, value in state.items():
                np.testing.assert_array_equal(after[name][row], value[0])
        runner.move(runner.first_batch_row(0) + batch_rows, batch_rows + 5)


def test_a_run_with_resets_that_fails_spoils_neither_slots_nor_seats(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.fragile())
    sit_and_run(runner, [INITIAL_SLOT] * 3, np.ones((3, 3), np.float32))
    kept = np.r_[0:18, runner.first_batch_row(0) + np.arange(3)]
    before = runner.read(kept)
    inputs = np.zeros((6, 3, 3), np.float32)
    inputs[-1] = 8
    resets = np.zeros((6, 3), np.bool_)

    for cut in (0, 2, 5):
        resets[cut, 1] = True
        with pytest.raises(Exception, match=r"out of (bounds|data)"):
            run(runner, inputs, None, resets)

    for name, value in runner.read(kept).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_run_copies_no_next_state(tmp_path: Path) -> None:
    """What a node makes has the graph's name: ONNX Runtime would keep an Identity between the two, and copy."""
    model = spec.load(MODELS / "copy" / "1" / "model.onnx", "copy", 1)
    run = onnx.load_model_from_string(graphs.derive(model.step, model.spec).run).graph

    makers = {name: node.op_type for node in run.node for name in node.output}
    assert "Identity" not in {makers[output.name] for output in run.output}


def test_the_body_of_a_node_may_take_the_next_state_from_around_itself(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.branching())
    inputs = np.random.default_rng(3).uniform(-1, 1, (4, 2, 3)).astype(np.float32)
    runner.move(np.full(2, INITIAL_SLOT), runner.first_batch_row(0) + np.arange(2))

    outputs = np.concatenate([run(runner, inputs[:1]), run(runner, inputs[1:])])

    sums = [np.zeros((2, 3), np.float32)]
    for row in inputs:
        sums.append(np.float32(0.5) * sums[-1] + row)
    np.testing.assert_array_equal(outputs, sums[1:])


def test_where_steps_at_once_would_give_something_else_each_is_run_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derive = graphs.derive

    def derive_with_another_scan(
        step: onnx.ModelProto, spec: model_pb2.ModelSpec, row_by_row: bool = False
    ) -> graphs.DeviceGraphs:
        scan = onnx.load_model_from_string(derive(step, spec).scan)
        body = scan.graph.node[0].attribute[0].g
        next(node for node in body.node if node.op_type == "Add").op_type = "Sub"
        return replace(derive(step, spec), scan=scan.SerializeToString())

    monkeypatch.setattr(graphs, "derive", derive_with_another_scan)

    with capture_logs() as logs:
        runner = runner_of(tmp_path, step_models.accumulator())

    assert runner.is_batch_invariant
    assert not runner.can_scan
    assert "several steps" in logs[0]["event"]
    assert "differ" in logs[0]["reason"]


def test_where_steps_at_once_fail_the_log_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_any = ModelRunner.run

    def run_one(self: ModelRunner, inputs: np.ndarray, bank: int = 0) -> np.ndarray:
        if len(inputs) > 1:
            raise RuntimeError("no kernel for Scan")
        return run_any(self, inputs, bank)

    monkeypatch.setattr(ModelRunner, "run", run_one)

    with capture_logs() as logs:
        runner = runner_of(tmp_path, step_models.accumulator())

    assert runner.is_batch_invariant
    assert not runner.can_scan
    assert logs[0]["reason"] == "no kernel for Scan"


def test_a_run_that_fails_spoils_neither_slots_nor_seats(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.fragile())
    sit_and_run(runner, [INITIAL_SLOT] * 3, np.ones((3, 3), np.float32))
    kept = np.r_[0:18, runner.first_batch_row(0) + np.arange(3)]
    before = runner.read(kept)

    inputs = np.zeros((4, 3, 3), np.float32)
    inputs[-1] = 8
    for num_steps in (1, 4, 4):
        with pytest.raises(Exception, match=r"out of (bounds|data)"):
            run(runner, inputs[-num_steps:])

    for name, value in runner.read(kept).items():
        np.testing.assert_array_equal(value, before[name])


def test_what_a_failed_session_left_does_not_fail_a_padded_batch(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.size_dependent())
    ones = np.ones((2, 3), np.float32)
    expected = sit_and_run(runner, [INITIAL_SLOT], ones[:1])
    nothing = {"sum": np.full((1, 3), np.nan, np.float32)}
    runner.write(np.array([5]), nothing)
    sit_and_run(runner, [INITIAL_SLOT, 5], ones)

    np.testing.assert_array_equal(sit_and_run(runner, [INITIAL_SLOT], ones[:1]), expected)
    assert np.isfinite(runner.read(runner.first_batch_row(0) + np.arange(8))["sum"]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [step_models.accumulator, step_models.delay_line, step_models.many_layouts])
def test_cuda_gives_what_the_cpu_gives(tmp_path: Path, make: object) -> None:
    content = make()  # type: ignore[operator]
    on_cpu, on_cuda = runner_of(tmp_path / "cpu", content), runner_of(tmp_path / "cuda", content, "cuda")
    inputs = np.random.default_rng(0).uniform(-1, 1, (20, 4, 3)).astype(np.float32)

    for row in inputs:
        np.testing.assert_allclose(
            steps(on_cuda, [2, 3, 4, 5], row), steps(on_cpu, [2, 3, 4, 5], row), rtol=1e-5
        )
