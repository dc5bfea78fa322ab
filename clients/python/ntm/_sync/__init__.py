# Generated from ntm/_async/__init__.py by `make sync`: edit that.
"""The client: `client.py` has calls, `session.py` one session's calls, `stream.py` the connection of a stream."""

from ntm._sync.client import Client
from ntm._sync.session import Session

__all__ = ["Client", "Session"]
