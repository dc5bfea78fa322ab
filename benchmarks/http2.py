"""HTTP/2 as a gRPC client needs it, and little more: many calls over one plain socket, at a few µs a message.

`load.py` decides what is sent and when. The usual path reads 9-byte frame headers and copies bytes; everything
else (settings, errors) goes through the `hyperframe` and `hpack` packages. The server is told to keep no table
of headers, so that equal header blocks have equal bytes and each is decoded once.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence
from time import perf_counter
from typing import Any
from urllib.parse import unquote

from hpack import Decoder, Encoder
from hyperframe.frame import Frame, GoAwayFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

# The bytes that the server may send before it hears from us again, for a call and for the connection.
WINDOW_BYTES = 2**31 - 1

_PATIENCE_S = 30.0
# Above 128 KiB malloc maps new pages for each call.
_RECEIVE_BYTES = 64 * 1024
_DEFAULT_WINDOW_BYTES = 65535
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER = struct.Struct(">IBI")  # 24 bits of length and 8 of type, flags, stream
_MESSAGE_PREFIX = struct.Struct(">BI")  # whether it is compressed, length
_DATA, _HEADERS, _SETTINGS, _PUSH_PROMISE, _PING, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 4, 5, 6, 8, 9
_ACK = _END_STREAM = 1
_END_HEADERS = 4


class LoadError(Exception):
    """A call failed, or the connection did; `status` is the gRPC status code where there is one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Stream:
    """One call. `owner` is whatever its caller wants to find again when an answer comes."""

    __slots__ = ("ends", "id", "num_unacknowledged", "owner", "unread", "unsent", "window")

    def __init__(self, stream_id: int, window: int, owner: Any) -> None:
        self.id = stream_id
        self.owner = owner
        self.window = window  # bytes that the server takes now
        self.unsent = bytearray()  # bytes that wait for the window
        self.ends = False  # the request ends with what is unsent
        self.unread = bytearray()  # a message that has come in part
        self.num_unacknowledged = 0  # bytes taken out of the server's window


class Connection:
    """A connection to a gRPC server. It is not blocking: wait with `select` before `receive`."""

    def __init__(self, address: str) -> None:
        self._address = address
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        settings = {
            SettingsFrame.HEADER_TABLE_SIZE: 0,
            SettingsFrame.ENABLE_PUSH: 0,
            SettingsFrame.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
        }
        window = WindowUpdateFrame(0, window_increment=WINDOW_BYTES - _DEFAULT_WINDOW_BYTES)
        self._outgoing = [_PREFACE, SettingsFrame(settings=settings).serialize(), window.serialize()]
        self._unwritten = b""  # what the socket did not take
        self._incoming = b""  # a frame that has come in part
        self._streams: dict[int, Stream] = {}
        self._waiting: dict[Stream, None] = {}  # those with something unsent, in order
        self._next_id = 1
        self._window = self._stream_window = _DEFAULT_WINDOW_BYTES
        self._max_frame_bytes = 16384
        self._num_unacknowledged = 0
        self._request_headers: dict[str, bytes] = {}
        self._good_headers: set[bytes] = set()
        self._good_trailers: set[bytes] = set()

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def open(self, method: str, owner: Any) -> Stream:
        """Begin a call of a method, such as "/ntm.v1.SessionService/Step"."""
        if method not in self._request_headers:
            self._request_headers[method] = self._encode_headers(method)
        block = self._request_headers[method]
        stream = self._streams[self._next_id] = Stream(self._next_id, self._stream_window, owner)
        self._next_id += 2
        self._outgoing += _FRAME_HEADER.pack(len(block) << 8 | _HEADERS, _END_HEADERS, stream.id), block
        return stream

    def send(self, stream: Stream, message: bytes, *, ends: bool) -> None:
        """Add a message to a call; `ends` says that it is the last. It leaves with the next `flush`."""
        data = _MESSAGE_PREFIX.pack(0, len(message)) + message
        size = len(data)
        if (
            size <= self._max_frame_bytes
            and size <= self._window
            and size <= stream.window
            and not stream.unsent
        ):
            self._window -= size
            stream.window -= size
            self._outgoing += _FRAME_HEADER.pack(size << 8 | _DATA, ends, stream.id), data
        else:
            stream.unsent += data
            stream.ends = ends
            self._waiting[stream] = None
            self._send_what_fits(stream)

    def end(self, stream: Stream) -> None:
        """End a request all of whose messages were answered."""
        assert not stream.unsent
        self._outgoing.append(_FRAME_HEADER.pack(_DATA, _END_STREAM, stream.id))

    def flush(self) -> bool:
        """Give the socket what there is; true when it did not take all: call again when it can be written."""
        if self._outgoing:
            self._unwritten += b"".join(self._outgoing)
            self._outgoing.clear()
        if self._unwritten:
            try:
                self._unwritten = self._unwritten[self._socket.send(self._unwritten) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise LoadError(f"the connection to {self._address} broke: {error}") from error
        return bool(self._unwritten)

    def receive(self) -> list[tuple[Stream, bytes | None]]:
        """What has come: messages, each with its call, and None for a call that ended with status OK.

        Raises:
            LoadError: a call failed, or the connection was closed.
        """
        try:
            data = self._incoming + self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LoadError(f"the connection to {self._address} broke: {error}") from error
        if len(data) == len(self._incoming):
            raise LoadError(f"{self._address} closed the connection")
        events: list[tuple[Stream, bytes | None]] = []
        at = 0
        while len(data) - at >= 9:
            length_and_type, flags, stream_id = _FRAME_HEADER.unpack_from(data, at)
            body, kind = at + 9, length_and_type & 0xFF
            end = body + (length_and_type >> 8)
            if end > len(data):
                break
            if kind == _DATA:
                if flags:
                    raise LoadError(
                        f"a DATA frame came with flags {flags}: padded, or the end without a status"
                    )
                self._read_data(self._streams[stream_id], data, body, end, events)
            elif kind == _HEADERS:
                block = data[body:end]
                if flags == _END_HEADERS:
                    if block not in self._good_headers:
                        self._check_headers(block)
                elif flags == _END_HEADERS | _END_STREAM:
                    if block not in self._good_trailers:
                        self._check_trailers(block)
                    stream = self._streams.pop(stream_id)
                    if stream.unread or stream.unsent:
                        raise LoadError("a call ended within a message")
                    events.append((stream, None))
                else:
                    raise LoadError(f"a HEADERS frame came with flags {flags}: padded, or in several frames")
            elif kind == _WINDOW_UPDATE:
                self._widen(stream_id, int.from_bytes(data[body:end]))
            elif kind == _PING:
                if not flags & _ACK:
                    self._outgoing += _FRAME_HEADER.pack(8 << 8 | _PING, _ACK, 0), data[body:end]
            else:
                self._control(kind, data[at:end])
            at = end
        self._incoming = data[at:]
        return events

    def _read_data(
        self, stream: Stream, data: bytes, start: int, end: int, events: list[tuple[Stream, bytes | None]]
    ) -> None:
        size = end - start
        self._num_unacknowledged = self._acknowledge(0, self._num_unacknowledged + size)
        stream.num_unacknowledged = self._acknowledge(stream.id, stream.num_unacknowledged + size)
        if not stream.unread and size >= 5 and _MESSAGE_PREFIX.unpack_from(data, start) == (0, size - 5):
            events.append((stream, data[start + 5 : end]))  # one frame, one message: the usual case
            return
        stream.unread += data[start:end]
        while len(stream.unread) >= 5:
            is_compressed, length = _MESSAGE_PREFIX.unpack_from(stream.unread)
            if is_compressed:
                raise LoadError("an answer is compressed, though nothing but identity was offered")
            if len(stream.unread) < 5 + length:
                break
            events.append((stream, bytes(stream.unread[5 : 5 + length])))
            del stream.unread[: 5 + length]

    def _acknowledge(self, stream_id: int, num_bytes: int) -> int:
        """Give the server its window back when half of it is used; returns the bytes still to be given back."""
        if num_bytes < WINDOW_BYTES // 2:
            return num_bytes
        self._outgoing.append(WindowUpdateFrame(stream_id, window_increment=num_bytes).serialize())
        return 0

    def _send_what_fits(self, stream: Stream) -> None:
        while stream.unsent:
            size = min(len(stream.unsent), self._max_frame_bytes, self._window, stream.window)
            if size <= 0:
                return
            self._window -= size
            stream.window -= size
            is_end = stream.ends and size == len(stream.unsent)
            self._outgoing += (
                _FRAME_HEADER.pack(size << 8 | _DATA, is_end, stream.id),
                bytes(stream.unsent[:size]),
            )
            del stream.unsent[:size]
        self._waiting.pop(stream, None)

    def _widen(self, stream_id: int, num_bytes: int) -> None:
        """The server takes so much more, on a stream or (0) on the connection."""
        if stream_id == 0:
            self._window += num_bytes
            for stream in list(self._waiting):
                self._send_what_fits(stream)
        elif stream_id in self._streams:  # else its call has ended
            self._streams[stream_id].window += num_bytes
            self._send_what_fits(self._streams[stream_id])

    def _control(self, kind: int, raw: bytes) -> None:
        """A frame that is rare, or the end."""
        frame, _ = Frame.parse_frame_header(memoryview(raw[:9]))
        frame.parse_body(memoryview(raw[9:]))
        if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self._max_frame_bytes = frame.settings.get(SettingsFrame.MAX_FRAME_SIZE, self._max_frame_bytes)
            window = frame.settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, self._stream_window)
            growth, self._stream_window = window - self._stream_window, window
            for stream_id in self._streams:
                self._widen(stream_id, growth)
            self._outgoing.append(_FRAME_HEADER.pack(_SETTINGS, _ACK, 0))
        elif isinstance(frame, RstStreamFrame) and frame.stream_id in self._streams:
            raise LoadError(f"{self._address} reset a call, HTTP/2 error {frame.error_code}")
        elif isinstance(frame, GoAwayFrame):
            told = frame.additional_data.decode(errors="replace")
            raise LoadError(f"{self._address} goes away, HTTP/2 error {frame.error_code}: {told}")
        elif kind in (_CONTINUATION, _PUSH_PROMISE):
            raise LoadError(f"{self._address} sent an unexpected frame: {frame}")

    def _encode_headers(self, method: str) -> bytes:
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", self._address),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "ntm-benchmarks"),
        ]
        # Sensitive headers go into no table, so that the block has the same meaning each time.
        return Encoder().encode([(name, value, True) for name, value in headers])

    def _check_headers(self, block: bytes) -> None:
        headers = _decode_headers(block)
        if headers.get(":status") != "200":
            raise LoadError(f"{self._address} answered with HTTP status {headers.get(':status')}")
        self._good_headers.add(block)

    def _check_trailers(self, block: bytes) -> None:
        trailers = _decode_headers(block)
        if trailers.get(":status", "200") != "200" or "grpc-status" not in trailers:
            raise LoadError(f"a call ended without a gRPC status: {trailers}")
        status = int(trailers["grpc-status"])
        if status != 0:
            message = unquote(trailers.get("grpc-message", ""))
            raise LoadError(f"a call failed with gRPC status {status}: {message}", status)
        self._good_trailers.add(block)


def exchange(
    connections: Sequence[Connection], timeout_s: float | None
) -> tuple[float, list[tuple[Stream, bytes | None]]]:
    """Send what is ready in one piece, wait for what comes, and take it in.

    Args:
        connections: all that may have something.
        timeout_s: how long to wait for something; None: it must come, and an answer that takes 30 s is not coming.

    Returns:
        The time at which it came, and what `receive` gives.

    Raises:
        LoadError: as `receive`, or nothing came.
    """
    unwritten = [connection for connection in connections if connection.flush()]
    readable, writable, _ = select.select(
        connections, unwritten, [], _PATIENCE_S if timeout_s is None else timeout_s
    )
    if timeout_s is None and not readable and not writable:
        raise LoadError(f"no answer for {_PATIENCE_S} s")
    now_s = perf_counter()
    return now_s, [event for connection in readable for event in connection.receive()]


def _decode_headers(block: bytes) -> dict[str, str]:
    decoder = Decoder()
    decoder.max_allowed_table_size = decoder.header_table_size = 0
    return {str(name): str(value) for name, value in decoder.decode(block)}
