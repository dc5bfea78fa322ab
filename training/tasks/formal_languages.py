"""Formal languages: the fifteen tasks of Delétang et al. (2022), "Neural networks and the Chomsky hierarchy".

The layout of a sequence: one step for each symbol of the word, one-hot on the first channels; one step with only the
last channel set, which ends the word; then a step of zeros for each symbol of the answer, at which it is due, by
softmax. As in the paper a model is trained on lengths to 40 and tried on 41 to 500, and its score is the share of right
symbols, averaged over the lengths.

Numbers modulo 5 are written by one symbol each. Binary numbers stand with the lowest digit first, unless it is said
otherwise. What is asked, by level of the hierarchy:

- regular: `even-pairs`, whether the first symbol is the last (the number of ab and ba is even); `parity-check`,
  whether the number of ones is odd; `cycle-navigation`, where one is on a ring of five after steps of 0, 1 and -1;
  `modular-arithmetic-simple`, the value of numbers joined by +, - and *, modulo 5;
- deterministic context-free: `stack-manipulation`, a stack, then pushes and pops: what is on it in the end, from the
  top, and an end symbol; `reverse-string`; `modular-arithmetic`, the value of an expression with brackets;
  `solve-equation`, x in such an expression, given its value;
- context-sensitive: `duplicate-string`; `missing-duplicate`, a word twice with one symbol missing: which;
  `odds-first`, the symbols at odd places, then those at even ones; `binary-addition` and `binary-multiplication` of
  two numbers, with an end symbol; `compute-sqrt`, the integer part of the root, highest digit first, as is the
  number; `bucket-sort`.

Shapes: N length of the word, A of the answer, B batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from training.losses import LOSSES, Loss
from training.tasks.task import Goal, Sequences, Size, Task, in_order

Word = list[int]
Language = Literal[
    "even-pairs",
    "parity-check",
    "cycle-navigation",
    "modular-arithmetic-simple",
    "stack-manipulation",
    "reverse-string",
    "modular-arithmetic",
    "solve-equation",
    "duplicate-string",
    "missing-duplicate",
    "odds-first",
    "binary-addition",
    "binary-multiplication",
    "compute-sqrt",
    "bucket-sort",
]
_MODULUS = 5
_OPERATORS = "+-*"


class FormalLanguageTask(Task):
    """Settings of the formal language task, and its sequences."""

    size_names: ClassVar = ("length",)

    name: Literal["formal-language"] = "formal-language"
    """The task."""
    language: Language = "reverse-string"
    """Which of the fifteen."""
    min_length: int = Field(default=1, ge=1)
    """Symbols in the shortest word of training."""
    max_length: int = Field(default=40, ge=1)
    """Symbols in the longest word of training."""

    @model_validator(mode="after")
    def _there_are_words(self) -> FormalLanguageTask:
        in_order("min_length", self.min_length, "max_length", self.max_length)
        if not self.sizes():
            raise ValueError(
                f"{self.language} has no words of {self.min_length} to {self.max_length} symbols"
            )
        return self

    @property
    def input_size(self) -> int:
        """The symbols and the end of the word."""
        return self._language.num_symbols + 1

    @property
    def output_size(self) -> int:
        """The symbols of answers."""
        return self._language.num_answers

    @property
    def loss(self) -> Loss:
        """An answer is a symbol."""
        return LOSSES["cross-entropy"]

    @property
    def goal(self) -> Goal:
        """Fewer than one symbol in a hundred is wrong."""
        return Goal("error_rate", 0.01)

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        symbols = self._language.symbols
        return (
            f"{self.language}: one-hot, {symbols}, then the end of the word; zeros while the answer is read"
        )

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return f"the probabilities of {self._language.answers}, once the end of the word was sent"

    def sizes(self) -> list[Size]:
        """Every length of training."""
        return [(length,) for length in range(self.min_length, self.max_length + 1)]

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random words: inputs [N + 1 + A, B, symbols + 1], targets [A, B]."""
        (length,) = size
        source = random.Random(int(torch.randint(2**62, (), generator=generator)))  # noqa: S311  # nosec B311  # no secret: made again by its seed
        pairs = [self._language.draw(length, source) for _ in range(batch_size)]
        words = torch.tensor([word for word, _ in pairs]).T
        longest = max(len(answer) for _, answer in pairs)
        targets = torch.zeros(longest, batch_size, dtype=torch.long)
        mask = torch.zeros(longest, batch_size, dtype=torch.bool)
        for row, (_, answer) in enumerate(pairs):
            targets[: len(answer), row] = torch.tensor(answer)
            mask[: len(answer), row] = True
        inputs = torch.zeros(len(words) + 1 + longest, batch_size, self.input_size)
        inputs[: len(words), :, :-1] = F.one_hot(words, self.input_size - 1)
        inputs[len(words), :, -1] = 1
        return Sequences(inputs, targets, None if mask.all() else mask)

    @property
    def _language(self) -> _Language:
        return _LANGUAGES[self.language]


class _Language(NamedTuple):
    """Words of one length and their answers."""

    draw: Callable[[int, random.Random], tuple[Word, Word]]
    """From a length to a word of that many symbols, or of about as many where there is none, and its answer."""
    symbols: str
    """For people, what symbols there are in a word, with a space between any two."""
    answers: str
    """The same of an answer."""

    @property
    def num_symbols(self) -> int:
        """In words."""
        return len(self.symbols.split())

    @property
    def num_answers(self) -> int:
        """In answers."""
        return len(self.answers.split())


def _bits(length: int, source: random.Random) -> Word:
    return [source.randrange(2) for _ in range(length)]


def _even_pairs(length: int, source: random.Random) -> tuple[Word, Word]:
    word = _bits(length, source)
    return word, [int(word[0] == word[-1])]


def _parity_check(length: int, source: random.Random) -> tuple[Word, Word]:
    word = _bits(length, source)
    return word, [sum(word) % 2]


def _cycle_navigation(length: int, source: random.Random) -> tuple[Word, Word]:
    """Symbols 0, 1 and 2 are steps of 0, 1 and -1."""
    word = [source.randrange(3) for _ in range(length)]
    return word, [(word.count(1) - word.count(2)) % _MODULUS]


def _modular_arithmetic_simple(length: int, source: random.Random) -> tuple[Word, Word]:
    length -= 1 - length % 2
    text = "".join(
        str(source.randrange(_MODULUS)) if place % 2 == 0 else source.choice(_OPERATORS)
        for place in range(length)
    )
    return _spelled(text), [_value(text)]


def _stack_manipulation(length: int, source: random.Random) -> tuple[Word, Word]:
    """Symbols 0 and 1 on the stack, bottom first, then 2 to pop, 3 and 4 to push 0 and 1; popping an empty stack does
    nothing."""
    num_on_stack = source.randrange(1, length) if length > 1 else 1
    stack = _bits(num_on_stack, source)
    actions = [source.choice([2, 3, 4]) for _ in range(length - num_on_stack)]
    word = stack + actions
    left = list(stack)
    for action in actions:
        if action == 2:
            left = left[:-1]
        else:
            left.append(action - 3)
    return word, [*reversed(left), 2]


def _reverse_string(length: int, source: random.Random) -> tuple[Word, Word]:
    word = _bits(length, source)
    return word, word[::-1]


def _modular_arithmetic(length: int, source: random.Random) -> tuple[Word, Word]:
    text = _expression(length, source)
    return _spelled(text), [_value(text)]


def _solve_equation(length: int, source: random.Random) -> tuple[Word, Word]:
    """An expression, one of its numbers replaced by x, then = and its value."""
    length = max(3, length)
    while True:
        text = _expression(length - 2, source)
        places = [place for place, symbol in enumerate(text) if symbol.isdigit()]
        hidden = source.choice(places)
        value = _value(text)
        solutions = [
            number
            for number in range(_MODULUS)
            if _value(text[:hidden] + str(number) + text[hidden + 1 :]) == value
        ]
        if len(solutions) == 1:
            return _spelled(text[:hidden] + "x" + text[hidden + 1 :] + "=" + str(value)), solutions


def _duplicate_string(length: int, source: random.Random) -> tuple[Word, Word]:
    word = _bits(length, source)
    return word, word + word


def _missing_duplicate(length: int, source: random.Random) -> tuple[Word, Word]:
    """Symbol 2 stands where one is missing, in the second half."""
    half = _bits(max(1, length // 2), source)
    place = source.randrange(len(half))
    return [*half, *half[:place], 2, *half[place + 1 :]], [half[place]]


def _odds_first(length: int, source: random.Random) -> tuple[Word, Word]:
    word = _bits(length, source)
    return word, word[::2] + word[1::2]


def _binary(length: int, source: random.Random, operation: Callable[[int, int], int]) -> tuple[Word, Word]:
    """Symbol 2 stands between the numbers, and after the result."""
    length = max(3, length)
    first = source.randrange(1, length - 1)
    numbers = [_bits(first, source), _bits(length - 1 - first, source)]
    result = operation(*(sum(bit << place for place, bit in enumerate(number)) for number in numbers))
    digits = [int(digit) for digit in reversed(f"{result:b}")]
    return [*numbers[0], 2, *numbers[1]], [*digits, 2]


def _binary_addition(length: int, source: random.Random) -> tuple[Word, Word]:
    return _binary(length, source, lambda one, other: one + other)


def _binary_multiplication(length: int, source: random.Random) -> tuple[Word, Word]:
    return _binary(length, source, lambda one, other: one * other)


def _compute_sqrt(length: int, source: random.Random) -> tuple[Word, Word]:
    word = [1, *_bits(length - 1, source)]
    root = math.isqrt(int("".join(map(str, word)), 2))
    return word, [int(digit) for digit in f"{root:b}"]


def _bucket_sort(length: int, source: random.Random) -> tuple[Word, Word]:
    word = [source.randrange(5) for _ in range(length)]
    return word, sorted(word)


_SYMBOLS = "01234+-*()x="


def _spelled(text: str) -> Word:
    return [_SYMBOLS.index(symbol) for symbol in text]


def _expression(length: int, source: random.Random) -> str:
    """An expression of so many symbols: a number, a number with a sign in brackets, or two in brackets, joined."""
    if length == 1:
        return str(source.randrange(_MODULUS))
    if length == 2:
        return "-" + _expression(1, source)
    if length == 3:
        return f"({_expression(1, source)})"
    if length == 4:
        return f"({_expression(2, source)})"
    left = source.randrange(1, length - 3)
    operator = source.choice(_OPERATORS)
    return f"({_expression(left, source)}{operator}{_expression(length - 3 - left, source)})"


def _value(text: str) -> int:
    """Of an expression, modulo 5; * goes before + and -."""
    place = 0

    def sum_of_products() -> int:
        nonlocal place
        value = product()
        while place < len(text) and text[place] in "+-":
            sign = 1 if text[place] == "+" else -1
            place += 1
            value += sign * product()
        return value % _MODULUS

    def product() -> int:
        nonlocal place
        value = factor()
        while place < len(text) and text[place] == "*":
            place += 1
            value *= factor()
        return value % _MODULUS

    def factor() -> int:
        nonlocal place
        symbol = text[place]
        place += 1
        if symbol == "-":
            return -factor()
        if symbol == "(":
            value = sum_of_products()
            place += 1
            return value
        return int(symbol)

    return sum_of_products()


_BITS, _NUMBERS = "0 1", "0 1 2 3 4"
_LANGUAGES: dict[Language, _Language] = {
    "even-pairs": _Language(_even_pairs, _BITS, "no yes"),
    "parity-check": _Language(_parity_check, _BITS, "even odd"),
    "cycle-navigation": _Language(_cycle_navigation, "stay forward back", _NUMBERS),
    "modular-arithmetic-simple": _Language(_modular_arithmetic_simple, f"{_NUMBERS} + - *", _NUMBERS),
    "stack-manipulation": _Language(_stack_manipulation, f"{_BITS} pop push-0 push-1", f"{_BITS} end"),
    "reverse-string": _Language(_reverse_string, _BITS, _BITS),
    "modular-arithmetic": _Language(_modular_arithmetic, f"{_NUMBERS} + - * ( )", _NUMBERS),
    "solve-equation": _Language(_solve_equation, f"{_NUMBERS} + - * ( ) x =", _NUMBERS),
    "duplicate-string": _Language(_duplicate_string, _BITS, _BITS),
    "missing-duplicate": _Language(_missing_duplicate, f"{_BITS} missing", _BITS),
    "odds-first": _Language(_odds_first, _BITS, _BITS),
    "binary-addition": _Language(_binary_addition, f"{_BITS} +", f"{_BITS} end"),
    "binary-multiplication": _Language(_binary_multiplication, f"{_BITS} *", f"{_BITS} end"),
    "compute-sqrt": _Language(_compute_sqrt, _BITS, _BITS),
    "bucket-sort": _Language(_bucket_sort, _NUMBERS, _NUMBERS),
}
