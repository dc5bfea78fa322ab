# Generated from ntm/_async/stream.py by `make sync`: edit that.
"""The connection of a stream: one StreamSteps call at a time, and a new one where it broke."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import grpc

from ntm._concurrency import RequestQueue
from ntm._errors import ClientError, DeadlineError, UnavailableError, translated
from ntm._flow import Flow
from ntm._requests import metadata
from ntm.v1 import session_service_pb2

if TYPE_CHECKING:
    from ntm._sync.session import Session


class Stream:
    """What the messages of a flow are sent on and their answers come back on."""

    def __init__(self, session: Session, flow: Flow) -> None:
        """Becomes the open stream of its session."""
        session._open_stream = self
        self._session = session
        self._flow = flow
        self._call: Any = None
        self._requests: RequestQueue[session_service_pb2.StreamStepsRequest] = RequestQueue()

    def send(self, requests: Iterable[session_service_pb2.StreamStepsRequest]) -> None:
        """Send messages, if there is a call to send them on; a new one begins with all that are unanswered.

        Raises:
            RuntimeError: another call of the session has ended the stream.
        """
        if self._session._open_stream is not self:
            raise RuntimeError("another call of its session ended this stream: begin a new one")
        if self._call is not None:
            for request in requests:
                self._requests.put(request)

    def receive(self) -> session_service_pb2.StreamStepsResponse:
        """The next answer, if need be on a new call.

        Raises:
            UnavailableError: the stream broke. ClientError: as the server says.
        """
        is_new = self._call is None
        if is_new:
            self._open()
        try:
            with translated():
                answer: session_service_pb2.StreamStepsResponse | None = next(iter(self._call), None)
            if answer is None:
                raise UnavailableError(
                    grpc.StatusCode.UNAVAILABLE, "", "the stream ended before all of it was answered", {}
                )
        except ClientError as error:
            self._hang_up()
            self._flow.failed(error)
            # A call's time is counted from its beginning, and it had begun before this answer was waited for.
            if isinstance(error, DeadlineError) and not is_new:
                return self.receive()
            raise
        return answer

    def finish(self) -> None:
        """End the call, all being answered, so that the server counts it as a success."""
        if self._call is not None:
            self._requests.close()
            with contextlib.suppress(grpc.RpcError):
                next(iter(self._call), None)

    def end(self) -> None:
        """Cancel what is under way, and leave to the session what it may have run."""
        if self._session._open_stream is self:
            self._hang_up()
            self._session._ahead = self._flow.ahead()
            self._session._open_stream = None

    def _open(self) -> None:
        self._requests = RequestQueue()
        self._call = self._session._client._sessions.StreamSteps(
            self._requests,
            timeout=self._session._client._timeout_s,
            metadata=metadata(self._session.session_id),
        )
        self.send(self._flow.unanswered())

    def _hang_up(self) -> None:
        if self._call is not None:
            self._requests.close()
            self._call.cancel()
            self._call = None
