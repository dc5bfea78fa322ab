"""Walk: the way of one warm Step through the server, call by call. `python -m benchmarks.walk` prints it.

The server runs in this process, without a store, and a profiler notes each call of its functions, in whatever thread,
between the arrival of one Step and its answer. What a reader must follow to understand a step is as long as this.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import numpy as np
import structlog

from benchmarks.server_process import MODELS
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from server.launch import build
from server.settings import ServerSettings

ROOT = Path(__file__).parent.parent
_NUM_WARM = 20


@dataclass(frozen=True)
class Walk:
    """Calls of the server's functions, in the order in which they began."""

    calls: list[tuple[str, str]]
    """File, below the server's folder, and function."""

    @property
    def num_files(self) -> int:
        """Files that were entered."""
        return len({file for file, _ in self.calls})

    @property
    def num_changes(self) -> int:
        """How often the next call was in another file."""
        return sum(1 for _ in groupby(file for file, _ in self.calls)) - 1


def walk() -> Walk:
    """Follow one Step of a warm session."""
    calls: list[tuple[str, str]] = []
    is_armed = False
    server_folder = str(ROOT / "server") + "/"

    def note(frame: FrameType, event: str, _: Any) -> None:
        if is_armed and event == "call":
            file = frame.f_code.co_filename
            name = frame.f_code.co_name
            if file.startswith(server_folder) and not name.startswith("<"):
                calls.append((file.removeprefix(server_folder), frame.f_code.co_qualname))

    async def run() -> None:
        nonlocal is_armed
        settings = ServerSettings(models=MODELS, store="none", listen="127.0.0.1:0", device="cpu")
        server = await build(settings)
        port = await server.start()
        inputs = to_message(np.zeros((1, 9), np.float32))

        def call() -> None:
            nonlocal is_armed
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub: Any = session_service_pb2_grpc.SessionServiceStub(channel)
                stub.CreateSession(pb.CreateSessionRequest(model_name="copy", session_id="s"))
                for number in range(_NUM_WARM + 1):
                    is_armed = number == _NUM_WARM
                    stub.Step(pb.StepRequest(session_id="s", inputs=inputs, first_step=number))
                is_armed = False

        await asyncio.to_thread(call)
        await server.stop()

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        asyncio.run(run())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return Walk(calls)


def main() -> None:
    """Print the walk."""
    walked = walk()
    for file, names in groupby(walked.calls, key=lambda call: call[0]):
        print(f"{file:32} {', '.join(name.rpartition('.')[2] for _, name in names)}")
    print(f"{walked.num_files} files, {len(walked.calls)} calls, {walked.num_changes} changes of file")


if __name__ == "__main__":
    main()
