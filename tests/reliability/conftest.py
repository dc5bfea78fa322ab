"""Hypothesis's profile for `python -m tests.chaos`, which has more time than `make test`."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("chaos", settings())
