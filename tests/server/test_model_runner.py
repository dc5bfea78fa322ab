"""The model runner alone: pools, padding, and what is measured at load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server import device, spec
from server.model_runner import INITIAL_SLOT, NUM_RESERVED_SLOTS, PADDING_SLOT, ModelRunner
from tests import step_models


def runner_of(tmp_path: Path, content: bytes, kind: device.RequestedDevice = "cpu") -> ModelRunner:
    model = spec.load(step_models.write(tmp_path, content), "test", 1)
    return ModelRunner(model, device.choose(kind, 0), num_slots=16, max_batch_size=8)


def steps(runner: ModelRunner, slots: list[int], inputs: np.ndarray) -> np.ndarray:
    """One step of some slots, in place."""
    outputs = runner.run(np.array(slots), inputs).copy()
    runner.commit(np.array(slots))
    return outputs


def test_a_commit_writes_the_slots_named_and_no_others(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.accumulator())
    every_slot = np.arange(16 + NUM_RESERVED_SLOTS)
    before = runner.read(every_slot)["sum"]
    inputs = np.ones((2, 3), np.float32)

    runner.run(np.array([INITIAL_SLOT, 4]), inputs)
    runner.commit(np.array([7, 9]))

    expected = before.copy()
    expected[7] = 1
    expected[9] = np.float32(0.5) * before[4] + 1
    np.testing.assert_array_equal(runner.read(every_slot)["sum"], expected)


def test_a_run_that_is_not_committed_changes_nothing(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.many_layouts())
    before = runner.read(np.arange(16))

    runner.run(np.array([3, 4, 5]), np.ones((3, 3), np.float32))

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

    together = runner.run(np.full(5, INITIAL_SLOT), inputs).copy()
    alone = np.concatenate([runner.run(np.array([INITIAL_SLOT]), row[None]).copy() for row in inputs])

    assert runner.is_batch_invariant
    np.testing.assert_array_equal(together, alone)


def test_padding_writes_only_the_slot_set_aside_for_it(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, step_models.size_dependent())
    every_slot = np.arange(16 + NUM_RESERVED_SLOTS)
    before = runner.read(every_slot)["sum"]

    runner.run(np.array([INITIAL_SLOT]), np.ones((1, 3), np.float32))
    runner.commit(np.array([5]))

    changed = np.flatnonzero((runner.read(every_slot)["sum"] != before).any(axis=1))
    assert set(changed.tolist()) <= {5, PADDING_SLOT}


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
