"""Sequences from files and from torch Datasets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.utils.data import Dataset

from training.errors import SettingsError, TaskError
from training.tasks import TASKS


def make_task(tmp_path, arrays, **settings):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"  # A file is read once.
    np.savez(path, **arrays)
    return TASKS["dataset"](train=str(path), validation=str(path), **settings)


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def bits(*shape):
    return np.random.default_rng(1).integers(0, 2, shape)


def drawn(task, batch_size, seed=0):
    sequences = task.draw(batch_size, task.sizes()[0], torch.Generator().manual_seed(seed))
    return task.check(sequences, batch_size)


def test_each_sequence_of_a_file_is_drawn_once_before_any_is_twice(tmp_path):
    inputs, targets = numbers(5, 7, 3), bits(5, 4, 2)
    task = make_task(tmp_path, {"inputs": inputs, "targets": targets})

    sequences = drawn(task, 10)

    assert (task.input_size, task.output_size, task.sizes()) == (3, 2, [(7,)])
    for rows in (slice(5), slice(5, 10)):
        found = [
            int(np.flatnonzero((inputs == row).all(axis=(1, 2)))[0])
            for row in sequences.inputs[:, rows].transpose(0, 1).numpy()
        ]
        assert sorted(found) == [0, 1, 2, 3, 4]
        assert (sequences.targets[:, rows].transpose(0, 1).numpy() == targets[found]).all()
    assert sequences.mask is None


def test_symbols_are_fed_one_hot_and_classes_are_asked_for_by_number(tmp_path):
    arrays = {"inputs": bits(4, 6) + 1, "targets": bits(4, 2)}
    task = make_task(tmp_path, arrays, num_symbols=3, num_classes=2, loss_name="cross-entropy")

    inputs, targets, _ = drawn(task, 4)

    assert (task.input_size, task.output_size) == (3, 2)
    assert sorted(inputs.argmax(dim=-1).T.tolist()) == sorted(arrays["inputs"].tolist())
    assert (inputs.sum(dim=-1) == 1).all()
    assert targets.dtype == torch.long
    assert task.goal == ("wrong_symbols", 0.1)


def test_lengths_cut_off_what_is_padding_and_a_mask_leaves_out_answers(tmp_path):
    arrays = {
        "inputs": numbers(2, 5, 1),
        "targets": numbers(2, 5, 1),
        "lengths": np.array([3, 4]),
        "mask": np.array([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]], bool),
    }
    task = make_task(tmp_path, arrays, loss_name="mean-squared-error")

    inputs, _, mask = drawn(task, 2)

    [first] = [
        row for row in range(2) if torch.equal(inputs[:3, row, 0], torch.tensor(arrays["inputs"][0, :3, 0]))
    ]
    assert inputs.shape == (4, 2, 1)
    assert mask[:, first].tolist() == [False, True, True, False]
    assert mask[:, 1 - first].tolist() == [True, True, False, True]
    assert task.sizes() == [(4,)]


class Counting(Dataset):
    """Sequence n is n steps long; its answer, due at the last two, is n."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        length = index + 2
        return torch.full((length, 1), float(length)), torch.full((2, 1), float(length))


counting = Counting()


@pytest.mark.parametrize("name", ["counting", "Counting"])
def test_a_torch_dataset_or_what_makes_one_is_found_by_its_import_path(monkeypatch, name):
    monkeypatch.setitem(
        __import__("sys").modules, "own_data", __import__("types").SimpleNamespace(**globals())
    )
    source = f"own_data:{name}"
    task = TASKS["dataset"](train=source, validation=source, loss_name="mean-squared-error")

    inputs, targets, mask = drawn(task, 4)

    lengths = inputs[0, :, 0].int().tolist()
    assert sorted(lengths) == [2, 3, 4, 5]
    for row, length in enumerate(lengths):
        assert mask[:, row].tolist() == [length - 2 <= step < length for step in range(5)]
        assert (targets[length - 2 : length, row] == length).all()


@pytest.mark.parametrize(
    ("arrays", "settings", "said"),
    [
        ({"inputs": numbers(2, 3, 1)}, {}, "must hold inputs and targets"),
        (
            {"inputs": numbers(2, 3, 1), "targets": bits(2, 3, 1), "label": bits(2)},
            {},
            "it has inputs, targets, label",
        ),
        ({"inputs": numbers(2, 3, 1), "targets": bits(3, 3, 1)}, {}, "it has inputs 2, targets 3"),
        ({"inputs": numbers(2, 3, 1), "targets": bits(2, 4, 1)}, {}, "3 steps and 4 answers"),
        ({"inputs": bits(2, 3), "targets": bits(2, 3, 1)}, {}, "say by task.num_symbols"),
        ({"inputs": bits(2, 3) + 7, "targets": bits(2, 3, 1)}, {"num_symbols": 3}, "from 0 to 2"),
        (
            {"inputs": numbers(2, 3, 1), "targets": bits(2, 3, 1) * 5},
            {},
            "from 0 to 1, not 0 to 5|not 5 to 5",
        ),
        (
            {"inputs": numbers(2, 3, 1), "targets": bits(2, 2, 1), "lengths": np.array([2, 3])},
            {},
            "targets must be for all 3 steps",
        ),
        (
            {"inputs": numbers(2, 3, 1), "targets": bits(2, 3, 1), "lengths": np.array([2, 4])},
            {},
            "lengths must be from 1 to 3",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_what_is_wrong_about_it(tmp_path, arrays, settings, said):
    task = make_task(tmp_path, arrays, **settings)

    with pytest.raises(TaskError, match=said):
        drawn(task, 2)


def test_a_file_that_is_not_there_or_is_no_npz_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("text.npz", "none.npz"):
        task = TASKS["dataset"](train=str(tmp_path / name), validation=str(tmp_path / name))
        with pytest.raises(TaskError, match="cannot be read as"):
            drawn(task, 2)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no_such_module:data", "there is no module 'no_such_module': run where it is, or add its folder"),
        ("math:data", "the module 'math' has no 'data'"),
        ("math:pi", "'math:pi' is no torch Dataset"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_refused(source, said):
    with pytest.raises(SettingsError, match=said):
        drawn(TASKS["dataset"](train=source, validation=source), 2)


def test_classes_are_counted_and_other_losses_have_none():
    with pytest.raises(ValidationError, match="num_classes goes with"):
        TASKS["dataset"](train="a.npz", validation="a.npz", loss_name="cross-entropy")
    with pytest.raises(ValidationError, match="num_classes goes with"):
        TASKS["dataset"](train="a.npz", validation="a.npz", num_classes=3)
