"""The report: every ratio that has a floor is measured by the quick run, and one under its floor fails it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks import report, serving, step_graph
from benchmarks.measuring import Figure, Figures

HELD = [ratio for ratio in report.RATIOS if ratio.floor is not None]


def figures_at(share_of_floor: float) -> Figures:
    """Figures in which each ratio that is held is so many times its floor."""
    figures: Figures = {}
    for ratio in HELD:
        assert ratio.floor is not None
        reached = share_of_floor * ratio.floor
        if ratio.case in figures:  # held against more than one
            figures[ratio.reference] = _metrics(figures[ratio.case]["steps_per_s"].median / reached)
        else:
            figures.setdefault(ratio.reference, _metrics(1.0))
            figures[ratio.case] = _metrics(figures[ratio.reference]["steps_per_s"].median * reached)
    return figures


def _metrics(steps_per_s: float) -> dict[str, Figure]:
    return {
        name: Figure(steps_per_s, steps_per_s, steps_per_s) for name in ("steps_per_s", "cpu_us_per_step")
    }


@pytest.mark.parametrize(("share_of_floor", "code"), [(1.1, 0), (0.9, 1)])
def test_the_quick_run_fails_when_a_ratio_is_under_its_floor(
    monkeypatch: pytest.MonkeyPatch, share_of_floor: float, code: int
) -> None:
    monkeypatch.setattr(step_graph, "compare", lambda **_: figures_at(share_of_floor))
    monkeypatch.setattr(serving, "compare_main", lambda **_: {})
    printed = io.StringIO()

    assert report.quick(Console(file=printed, width=140)) == code
    assert "floor" in printed.getvalue()


def test_the_quick_run_measures_all_that_has_a_floor() -> None:
    figures = step_graph.compare(num_rounds=1, duration_s=0.01, only_shipped=True)
    figures |= serving.compare_main(num_rounds=1, duration_s=0.3)

    assert {name for ratio in HELD for name in (ratio.case, ratio.reference)} <= figures.keys()
