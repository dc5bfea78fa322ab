"""The client: `client.py` has calls, `session.py` one session's calls, `stream.py` the connection of a stream."""

from ntm._async.client import AsyncClient
from ntm._async.session import AsyncSession

__all__ = ["AsyncClient", "AsyncSession"]
