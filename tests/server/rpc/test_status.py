"""The table from errors to statuses."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from server import errors
from server.rpc import status

PROTOS = Path(__file__).parents[3] / "protos" / "ntm" / "v1"


def all_errors() -> list[type[errors.ServingError]]:
    found = [value for value in vars(errors).values() if inspect.isclass(value)]
    return [value for value in found if issubclass(value, errors.ServingError)]


def test_every_error_that_a_caller_can_meet_has_a_row() -> None:
    bases = {base for error in all_errors() for base in error.__bases__}
    never_sent = {errors.ServingError, errors.StepOrderError, errors.StoreError, errors.RecoveryError}
    expected = {
        error
        for error in all_errors()
        if not issubclass(error, errors.StartupError) and error not in never_sent
    }

    assert set(status._TABLE) == expected
    assert never_sent <= bases


def test_two_errors_have_one_reason_only_where_one_is_a_kind_of_the_other() -> None:
    for error, told in status._TABLE.items():
        alike = {other for other, told_other in status._TABLE.items() if told_other[1] == told[1]}
        base = max(alike, key=lambda other: sum(issubclass(each, other) for each in alike))

        assert issubclass(error, base)
        assert {status._TABLE[other] for other in alike} == {told}


def test_the_error_tree_at_the_top_of_the_module_names_every_error() -> None:
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__ or ""))

    assert drawn == {error.__name__ for error in all_errors()}


@pytest.mark.parametrize(
    "reason", sorted(set(re.findall(r"\(([A-Z]+_[A-Z_]+)\)", (PROTOS / "session_service.proto").read_text())))
)
def test_every_reason_that_the_protos_promise_exists(reason: str) -> None:
    assert reason in {known for _, known in status._TABLE.values()}


def test_an_error_of_ours_keeps_its_words_and_a_bug_tells_nothing_of_its_inside() -> None:
    gap = status.of(errors.StepGapError(5, 2))
    bug = status.of(RuntimeError("secret path"))

    assert (gap.reason, gap.metadata) == ("STEP_GAP", {"next_step": "2"})
    assert bug.code.name == "INTERNAL"
    assert "secret" not in bug.message
