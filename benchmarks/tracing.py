"""Tracing: what a span for each call costs a server, and what it costs one that sends none.

    python -m benchmarks.tracing

Three servers, without a store, and the project's asyncio client: one is not traced, one traces every call, and one
traces one in a hundred. Their collector, in this process, takes what it is sent and looks at nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.measuring import Case, Figures, side_by_side
from benchmarks.routing import NUM_SESSIONS, Load
from benchmarks.server_process import MODELS, serving

_ONE_IN_A_HUNDRED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}


def compare(num_rounds: int, duration_s: float) -> Figures:
    """Single steps of 16 sessions, as calls, on each of the servers."""
    with ExitStack() as stack:
        traced = ("--otlp-endpoint", stack.enter_context(_collector()))
        runner = stack.enter_context(asyncio.Runner())
        cases: dict[str, Case] = {}
        for name, flags, variables in (
            ("not traced", (), {}),
            ("every call traced", traced, {}),
            ("one call in a hundred traced", traced, _ONE_IN_A_HUNDRED),
        ):
            address, pids = stack.enter_context(serving(MODELS, *flags, variables=variables))
            load = Load(runner, address, "Step", duration_s, pids, [])
            stack.callback(load.close)
            cases[f"{NUM_SESSIONS} sessions, Step, T=1, {name}"] = load.measure
        return side_by_side(cases, num_rounds)


@contextmanager
def _collector() -> Iterator[str]:
    """Takes spans, and forgets them; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Taker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Taker(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is said of what is taken."""


def main() -> None:
    """Measure, print and write down."""
    from rich.console import Console

    from benchmarks import report

    report.keep("tracing", compare(num_rounds=5, duration_s=2.0), Console())


if __name__ == "__main__":
    main()
