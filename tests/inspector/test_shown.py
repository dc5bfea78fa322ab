"""What is shown of a large tensor: blocks, each by the number in it that is farthest from 0."""

from __future__ import annotations

import numpy as np
import pytest

from inspector import shown


@pytest.mark.parametrize(
    ("shape", "expected"), [((), (1, 1)), ((7,), (1, 7)), ((4, 5), (4, 5)), ((2, 3, 5), (6, 5))]
)
def test_a_tensor_is_folded_into_rows_and_columns(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert shown.fold(shape) == expected


def test_a_tensor_that_fits_is_shown_as_it_is() -> None:
    array = np.random.default_rng(0).standard_normal((3, 64, 1024)).astype(np.float32)

    block = shown.frame((64, 1024))

    assert block.is_whole
    np.testing.assert_array_equal(block.shown(array), array)


@pytest.mark.parametrize("shape", [(1000, 700), (3, 100_000), (500_000,), (7, 11, 13, 600)])
def test_a_large_one_shows_of_each_block_the_number_farthest_from_0(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)

    block = shown.frame(shape, limit=2000)
    reduced = block.shown(array)

    assert not block.is_whole
    assert reduced.shape == (2, block.shown_rows, block.shown_columns)
    assert reduced[0].size <= 2000
    folded = array.reshape(2, block.rows, block.columns)
    for row, column in [
        (0, 0),
        (block.shown_rows - 1, block.shown_columns - 1),
        (0, block.shown_columns // 2),
    ]:
        part = folded[
            1,
            row * block.block_rows : (row + 1) * block.block_rows,
            column * block.block_columns : (column + 1) * block.block_columns,
        ]
        assert reduced[1, row, column] == part.flat[np.abs(part).argmax()]


def test_attention_keeps_its_heads_apart() -> None:
    block = shown.attention((3, 5000), limit=3000)

    assert (block.shown_rows, block.block_columns) == (3, 5)
    assert shown.attention((2, 128)).is_whole
