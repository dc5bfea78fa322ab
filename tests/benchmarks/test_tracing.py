"""The benchmark of tracing: each server is measured, on this machine."""

from __future__ import annotations

from benchmarks import tracing


def test_a_server_without_spans_and_two_with_some_are_measured() -> None:
    figures = tracing.compare(num_rounds=1, duration_s=0.1)

    assert len(figures) == 3
    assert all(metrics["servers_cpu_us_per_step"].median > 0 for metrics in figures.values())
