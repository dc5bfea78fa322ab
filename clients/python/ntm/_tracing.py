"""Tracing: the context of the application's trace, for the server to go on with.

Where OpenTelemetry is not installed in the application, or no trace is under way, nothing is sent.
"""

from __future__ import annotations

try:
    from opentelemetry import propagate
except ImportError:
    propagate = None  # type: ignore[assignment]

Metadata = tuple[tuple[str, str], ...]


def context() -> Metadata:
    """What the application's propagators say of the trace under way, by default W3C's `traceparent`, as metadata."""
    if propagate is None:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
