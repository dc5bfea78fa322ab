"""Each language's answers, against values worked out by hand and slow readings of the definitions."""

from __future__ import annotations

import itertools
import math
import random
from typing import get_args

import pytest
import torch

from training.tasks.formal_languages import _LANGUAGES, _SYMBOLS, FormalLanguageTask, Language, _value

LENGTHS = [1, 2, 3, 4, 5, 8, 17, 40]


def drawn(language: str, length: int):
    """Ten words and their answers."""
    source = random.Random(length)
    return [_LANGUAGES[language].draw(length, source) for _ in range(10)]


def text(word: list[int]) -> str:
    return "".join(_SYMBOLS[symbol] for symbol in word)


def number(digits: list[int]) -> int:
    """From binary digits, the lowest first."""
    return sum(digit * 2**place for place, digit in enumerate(digits))


def expected(language: str, word: list[int]) -> list[int]:
    """The answer, by another way than the task's where there is one."""
    match language:
        case "even-pairs":
            return [int(sum(a != b for a, b in itertools.pairwise(word)) % 2 == 0)]
        case "parity-check":
            return [int(word.count(1) in range(1, len(word) + 1, 2))]
        case "cycle-navigation":
            place = 0
            for step in word:
                place = [place, place + 1, place - 1][step] % 5
            return [place]
        case "modular-arithmetic-simple" | "modular-arithmetic":
            return [eval(text(word)) % 5]
        case "solve-equation":
            left, right = text(word).split("=")
            return [x for x in range(5) if eval(left.replace("x", str(x))) % 5 == int(right)]
        case "stack-manipulation":
            stack: list[int] = []
            for symbol in word:
                stack = stack[:-1] if symbol == 2 else [*stack, symbol % 3]
            return [*stack[::-1], 2]
        case "reverse-string":
            return [word[-1 - place] for place in range(len(word))]
        case "duplicate-string":
            return [word[place % len(word)] for place in range(2 * len(word))]
        case "missing-duplicate":
            half = len(word) // 2
            assert word.count(2) == 1
            return [word[word.index(2) - half]]
        case "odds-first":
            odd = [symbol for place, symbol in enumerate(word, 1) if place % 2]
            return odd + [symbol for place, symbol in enumerate(word, 1) if place % 2 == 0]
        case "binary-addition" | "binary-multiplication":
            one, other = number(word[: word.index(2)]), number(word[word.index(2) + 1 :])
            result = one + other if language == "binary-addition" else one * other
            return [int(digit) for digit in bin(result)[:1:-1]] + [2]
        case "compute-sqrt":
            square, root = number(word[::-1]), 0
            while (root + 1) ** 2 <= square:
                root += 1
            return [int(digit) for digit in bin(root)[2:]]
        case "bucket-sort":
            return [symbol for bucket in range(5) for symbol in word if symbol == bucket]
    raise AssertionError(language)


@pytest.mark.parametrize("language", get_args(Language))
@pytest.mark.parametrize("length", LENGTHS)
def test_answers_are_those_of_a_slow_reading_of_the_definition(language, length):
    if language == "compute-sqrt" and length > 17:
        pytest.skip("counting up to the root would take days")

    for word, answer in drawn(language, length):
        assert answer == expected(language, word)
        assert length - 1 <= len(word) <= max(3, length)


def test_the_root_of_a_long_number_is_its_integer_part():
    for word, answer in drawn("compute-sqrt", 40):
        assert number(answer[::-1]) == math.isqrt(number(word[::-1]))


@pytest.mark.parametrize(
    ("expression", "value"), [("1+2*3", 2), ("-2", 3), ("(4*(3-1))", 3), ("2-3-4", 0), ("2*3*4-1", 3)]
)
def test_an_expression_has_its_value_modulo_five(expression, value):
    assert _value(expression) == value


@pytest.mark.parametrize("language", get_args(Language))
def test_a_sequence_is_the_word_then_its_end_then_zeros_while_the_answer_is_due(language):
    task = FormalLanguageTask(language=language)

    inputs, targets, mask = task.check(task.draw(5, (12,), torch.Generator().manual_seed(0)), 5)

    length = int(inputs[:, 0, -1].argmax())
    assert length in (11, 12)
    assert (inputs[:length, :, :-1].sum(-1) == 1).all()
    assert (inputs[length, :, :-1] == 0).all()
    assert (inputs[length + 1 :] == 0).all()
    assert len(targets) == len(inputs) - length - 1
    for row in range(5):
        word = inputs[:length, row, :-1].argmax(-1).tolist()
        due = targets[:, row] if mask is None else targets[mask[:, row], row]
        assert due.tolist() == expected(language, word)
