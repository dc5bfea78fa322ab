"""Report: what is measured, which ratios are drawn from it, and where the results go.

`full` writes `results/*.json` and the plots; `quick` prints the main ratios and holds them to floors, which lie well
below what is measured, so that only a regression falls under them and not a busy machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import growth, plots, residence, routing, service_load, serving, step_graph, tracing
from benchmarks.measuring import Figures, machine, ratio
from benchmarks.peers import triton
from benchmarks.server_process import Shape
from benchmarks.serving import (
    BATCHES_OF_SINGLE_STEPS,
    FEW_STREAMS_OF_CHUNKS,
    PLAIN_CALLS,
    SHAPES_BY_STORE,
    STORES,
    STREAMS_OF_CHUNKS,
    STREAMS_OF_SINGLE_STEPS,
    name,
)

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """One case by another, in steps/s."""

    case: str
    reference: str
    target: float | None = None
    floor: float | None = None
    """None: not measured by `quick`."""


_STORE_TARGETS = {"SQLite, sync full": 0.7, "Valkey, everysec": 0.6}
_BARE = "bare, batch 64"
_GRAPH = step_graph.SHIPPED_SIZE
RATIOS = (
    Ratio(f"exported, {_GRAPH}, batch 1", f"textbook, {_GRAPH}, batch 1", 1.3, 1.1),
    Ratio(f"exported, {_GRAPH}, batch 64", f"textbook, {_GRAPH}, batch 64", 2.0, 1.5),
    Ratio("engine, 64 sessions in one message, T=32", _BARE, 1 / 1.15, 0.75),
    Ratio("engine, 64 sessions in a message each, T=32", _BARE, 1 / 1.15, 0.7),
    Ratio("engine, 64 sessions in one message, T=1", _BARE),
    Ratio(name(Shape("BatchStep", 64, 32)), _BARE, 0.8, 0.6),
    Ratio(name(BATCHES_OF_SINGLE_STEPS), _BARE, 0.45, 0.3),
    Ratio(name(STREAMS_OF_CHUNKS), _BARE, 0.8, 0.55),
    Ratio(name(STREAMS_OF_SINGLE_STEPS), name(STREAMS_OF_SINGLE_STEPS, "echo with uvloop"), 0.75, 0.2),
    Ratio(name(STREAMS_OF_SINGLE_STEPS), name(STREAMS_OF_SINGLE_STEPS, "Triton"), 0.8),
    Ratio(name(STREAMS_OF_CHUNKS), name(Shape("StreamSteps", 64, 1), "Triton"), 5.0),
    Ratio(name(PLAIN_CALLS), name(PLAIN_CALLS, "echo with uvloop"), 1.5, 1.0),
    Ratio(name(PLAIN_CALLS), name(PLAIN_CALLS, "Triton"), 1.2),
    Ratio(name(Shape("Step", 8, 1)), name(Shape("Step", 8, 1), "Triton"), 1.1),
    Ratio(name(Shape("Step", 1, 1)), name(Shape("Step", 1, 1), "Triton"), 1.0),
    *(
        Ratio(
            service_load.name(kind, server, by_inference),
            service_load.name(kind, "Triton", by_inference=True),
        )
        for kind in service_load.KINDS
        for server, by_inference in (("none", False), ("none", True), ("SQLite, sync normal", False))
    ),
    Ratio(service_load.client_name("none"), service_load.client_name("Triton"), 1.0),
    Ratio(name(STREAMS_OF_CHUNKS), name(FEW_STREAMS_OF_CHUNKS, "naive"), 10.0, 10.0),
    *(
        Ratio(
            name(shape, store),
            name(shape, "none"),
            _STORE_TARGETS.get(store) if shape.num_steps > 1 else None,
        )
        for shape in SHAPES_BY_STORE
        for store in STORES[1:]
    ),
)


PARTS: dict[str, Callable[[], Figures]] = {
    "step_graph": partial(step_graph.compare, num_rounds=7, duration_s=0.5),
    "serving": partial(serving.compare, num_rounds=5, duration_s=1.0),
    "latency": partial(serving.compare_latency, num_rounds=5, duration_s=2.0),
    "stores": partial(serving.compare_stores, num_rounds=5, duration_s=1.0),
    "routing": partial(routing.compare, num_rounds=5, duration_s=2.0),
    "tracing": partial(tracing.compare, num_rounds=5, duration_s=2.0),
    "residence": partial(residence.compare, num_rounds=2, duration_s=2.0),
    "service_load": service_load.compare,
    "growth": partial(growth.compare, num_rounds=5, duration_s=0.7),
}
"""What `full` measures, each into a file of its own."""


def full(console: Console, parts: Sequence[str]) -> int:
    """Measure some of `PARTS`, write it down, and draw it if it is all; returns the exit code."""
    try:
        triton.install()
    except triton.TritonUnavailableError as error:
        console.print(f"[red]{error}[/red]")
        return 1
    RESULTS.mkdir(exist_ok=True)
    figures: Figures = {}
    for part in parts:
        with console.status(f"measuring {part}"):
            found = PARTS[part]()
        keep(part, found, console)
        figures |= found
    if {*parts} == {*PARTS}:
        plots.draw(figures, RESULTS)
    console.print(_table_of_ratios(figures, [ratio for ratio in RATIOS if ratio.case in figures]))
    return 0


def keep(what: str, figures: Figures, console: Console) -> None:
    """Write down what was measured, and show it."""
    _write(what, figures)
    console.print(_table_of(what, figures))


def quick(console: Console) -> int:
    """Measure the main ratios; returns 1 if one is under its floor."""
    with console.status("measuring"):
        figures = step_graph.compare(num_rounds=3, duration_s=0.2, only_shipped=True)
        figures |= serving.compare_main(num_rounds=3, duration_s=0.5)
    held = [ratio for ratio in RATIOS if ratio.floor is not None]
    console.print(_table_of_ratios(figures, held))
    return int(any(ratio(figures, r.case, r.reference) < (r.floor or 0) for r in held))


def _write(what: str, figures: Figures) -> None:
    content = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "figures": {
            case: {metric: asdict(figure) for metric, figure in metrics.items()}
            for case, metrics in figures.items()
        },
    }
    (RESULTS / f"{what}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _table_of(what: str, figures: Figures) -> Table:
    table = Table(
        "case", "steps/s", "lowest to highest", "p50 ms", "p99 ms", "in time", "CPU µs a step", title=what
    )
    for case, metrics in figures.items():
        speed = metrics.get("steps_per_s")
        some = {
            metric: f"{metrics[metric].median:.2f}" for metric in ("p50_ms", "p99_ms") if metric in metrics
        }
        share, cpu = metrics.get("share_in_time"), metrics.get("cpu_us_per_step")
        table.add_row(
            case,
            f"{speed.median:,.0f}" if speed else "",
            f"{speed.lowest:,.0f} – {speed.highest:,.0f}" if speed else "",
            some.get("p50_ms", ""),
            some.get("p99_ms", ""),
            f"{share.median:.1%}" if share else "",
            f"{cpu.median:.1f}" if cpu else "",
        )
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _table_of_ratios(figures: Figures, ratios: list[Ratio]) -> Table:
    table = Table(
        "case", "held against", "ratio", "target", "floor", "CPU µs a step, both", title="ratios of steps/s"
    )
    for r in ratios:
        reached = ratio(figures, r.case, r.reference)
        cpu_us = [figures[case]["cpu_us_per_step"].median for case in (r.case, r.reference)]
        colour = "red" if reached < (r.floor or 0) else "green" if reached >= (r.target or 0) else "yellow"
        table.add_row(
            r.case,
            r.reference,
            f"[{colour}]{reached:.2f}[/{colour}]",
            f"{r.target:.2f}" if r.target else "",
            f"{r.floor:.2f}" if r.floor else "",
            f"{cpu_us[0]:.1f}, {cpu_us[1]:.1f}",
        )
    return table
