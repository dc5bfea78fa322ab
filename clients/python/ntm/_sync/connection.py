# Generated from ntm/_async/connection.py by `make sync`: edit that.
"""The connection of a client: a channel, and the stubs that make calls on it."""

from __future__ import annotations

from ntm._channel import Tls, Token, channel
from ntm._routing import Target
from ntm.v1 import model_service_pb2_grpc, session_service_pb2_grpc


class Connection:
    """A channel and its stubs. Those to one target share what lies below: one TCP connection to each server."""

    def __init__(self, where: Target, tls: Tls | None, token: Token | None) -> None:
        """Connects when first used."""
        self.channel = channel(where, tls or False, token)
        self.sessions = session_service_pb2_grpc.SessionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def close(self) -> None:
        """Cancel what is under way."""
        self.channel.close()
