"""The benchmark of routing: both ways are measured, on servers and an Envoy of this machine."""

from __future__ import annotations

from benchmarks import routing


def test_both_ways_are_measured_and_envoy_spends_nothing_on_calls_that_pass_it_by() -> None:
    figures = routing.compare(num_rounds=1, duration_s=0.1)

    assert len(figures) == 4
    for case, metrics in figures.items():
        assert metrics["steps_per_s"].median > 0
        assert "Envoy" in case or metrics["envoy_cpu_us_per_step"].highest == 0
