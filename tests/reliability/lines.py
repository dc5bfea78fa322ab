"""A line to a store that can fail: a TCP proxy that passes bytes on, or does something else with them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable


class FaultyLine:
    """Between a server and its store."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._is_refusing = False
        self._is_swallowing_replies = False
        self._marker: bytes | None = None
        self._muted: socket.socket | None = None
        self.num_marked = 0
        self._on_request: Callable[[bytes], bool] = lambda _: False
        self._open = threading.Event()
        """Cleared: nothing passes until it is set; then all that waited arrives late."""
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        """Cut every connection, and accept none."""
        self._is_refusing = True
        self.cut()

    def cut(self) -> None:
        """Reset every connection: what is under way is lost."""
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def swallow_replies(self) -> None:
        """Requests arrive, their answers never."""
        self._is_swallowing_replies = True

    def swallow_reply_to(self, marker: bytes) -> None:
        """The first request with these bytes arrives, its answer never; `num_marked` counts all that have them."""
        self._marker = marker

    def hold(self) -> None:
        """Nothing passes for now, in either direction."""
        self._open.clear()

    def cut_at(self, marker: bytes) -> None:
        """Cut everything when a request has these bytes, before they arrive; then all is well again."""

        def is_it(data: bytes) -> bool:
            if marker not in data:
                return False
            self._on_request = lambda _: False
            return True

        self._on_request = is_it

    def heal(self) -> None:
        """New connections work as they should, and held ones go on."""
        self._is_refusing = self._is_swallowing_replies = False
        self._open.set()

    def close(self) -> None:
        self._listener.close()
        self.refuse()
        self._open.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            if self._is_refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:  # the store is away
                near.close()
                continue
            with self._lock:
                self._ends += [near, far]
            for source, sink, is_reply in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=(source, sink, is_reply), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        # A connection whose reply was swallowed stays mute, so that no later reply is taken for it.
        is_mute = False
        try:
            while data := source.recv(64 * 1024):
                self._open.wait()
                if not is_reply and self._on_request(data):
                    self.cut()
                    return
                if not is_reply and self._marker is not None and self._marker in data:
                    self._muted = self._muted or sink
                    self.num_marked += 1
                is_mute = is_mute or (is_reply and (self._is_swallowing_replies or source is self._muted))
                if not is_mute:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # cut
            return
