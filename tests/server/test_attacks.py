"""What one caller, or one file, could do to all others, and no longer can; on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import safetensors.numpy
import structlog
from hyperframe.frame import Frame, SettingsFrame

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import tensor_pb2
from server.launch import EXIT_NOT_STOPPED_IN_TIME, EXIT_THREAD_DIED
from server.rpc.transport import MAX_CONCURRENT_STREAMS
from server.storage.codec import MAX_IMPORTED_STEP
from server.storage.factory import open_store, without_secrets
from server.storage.interface import FIRST_FENCE, NEW, Entry, Record, Write
from tests import step_models
from tests.conftest import ROOT
from tests.server.helpers import INVALID, Caller, Start, accumulated, random_inputs, refused


def with_next_step(snapshot: bytes, next_step: int) -> bytes:
    """A snapshot as somebody could forge it: another counter, and the checksum that goes with it."""
    import zlib

    length = int.from_bytes(snapshot[:8], "little")
    metadata = json.loads(snapshot[8 : 8 + length])["__metadata__"]
    tensors = safetensors.numpy.load(snapshot)
    checksum = zlib.crc32(str(next_step).encode())
    for name, array in tensors.items():
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), checksum))
    metadata |= {"next_step": str(next_step), "crc32": f"{checksum:08x}"}
    return safetensors.numpy.save(tensors, metadata)


@pytest.mark.parametrize("next_step", [2**53, 2**63 - 1, 2**64, 10**40, -1])
async def test_a_snapshot_with_an_absurd_counter_is_refused_and_leaves_nothing(
    caller: Caller, next_step: int
) -> None:
    await caller.create("accumulator")
    snapshot = (await caller.stub.ExportSession(pb.ExportSessionRequest(session_id="s"))).snapshot

    for number in range(12):  # more than there are places
        request = pb.ImportSessionRequest(
            snapshot=with_next_step(snapshot, next_step), session_id=f"i{number}"
        )
        await refused(caller.stub.ImportSession(request), INVALID, "INVALID_INPUT")

    await caller.create("accumulator", "another")
    assert len((await caller.stub.ListSessions(pb.ListSessionsRequest())).sessions) == 2


async def test_a_session_from_the_largest_counter_steps_on_and_does_not_disturb_its_neighbours(
    caller: Caller,
) -> None:
    await caller.create("accumulator")
    await caller.create("accumulator", "neighbour")
    snapshot = (await caller.stub.ExportSession(pb.ExportSessionRequest(session_id="s"))).snapshot
    request = pb.ImportSessionRequest(snapshot=with_next_step(snapshot, MAX_IMPORTED_STEP), session_id="far")
    await caller.stub.ImportSession(request)
    inputs = random_inputs(8)

    for start in range(0, 8, 2):
        rows = inputs[start : start + 2]
        far, near = await asyncio.gather(caller.step(rows, "far"), caller.step(rows, "neighbour"))
        assert far.tobytes() == near.tobytes() == accumulated(inputs)[start : start + 2].tobytes()
    assert await caller.next_step("far") == MAX_IMPORTED_STEP + 8


@pytest.mark.parametrize("number", [2**53, 2**63 - 1, 2**63, 2**64 - 1])
async def test_absurd_step_numbers_are_refused_and_the_neighbours_go_on(caller: Caller, number: int) -> None:
    await caller.create("accumulator")
    await caller.create("accumulator", "t")
    inputs = random_inputs(2)
    tensor = to_message(np.stack([inputs, inputs]))

    batch = await caller.stub.BatchStep(
        pb.BatchStepRequest(session_ids=["s", "t"], first_steps=[number, 0], inputs=tensor)
    )
    assert [(error.index, error.reason) for error in batch.errors] == [(0, "STEP_GAP")]
    for call in (
        caller.step(inputs, first_step=number),
        caller.stub.ResetSession(pb.ResetSessionRequest(session_id="s", at_step=number)),
        caller.stub.ForkSession(pb.ForkSessionRequest(source_session_id="s", at_step=number)),
    ):
        await refused(call, grpc.StatusCode.FAILED_PRECONDITION, "STEP_GAP")


async def test_a_shape_of_millions_of_axes_is_refused_before_anything_is_made_of_it(caller: Caller) -> None:
    await caller.create("accumulator")
    absurd = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FP32, shape=[1] * 120_000, raw=b"1234")
    request = pb.StepRequest(session_id="s", inputs=absurd)

    with pytest.raises(grpc.aio.AioRpcError, match="shape has 120000 axes"):
        await caller.stub.Step(request)


@pytest.mark.parametrize("rpc", ["Step", "StreamSteps", "CreateSession", "BatchStep"])
async def test_bytes_that_are_no_message_are_bad_input_and_not_a_bug(
    caller: Caller, rpc: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"/ntm.v1.SessionService/{rpc}"

    async def call() -> None:
        if rpc == "StreamSteps":
            await anext(aiter(caller.channel.stream_stream(path)(iter([b"\xff"]))))
        else:
            await caller.channel.unary_unary(path)(b"\xff")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()

    assert caught.value.code() == INVALID
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err


async def test_names_of_states_are_counted_before_they_are_looked_at(caller: Caller) -> None:
    await caller.create("accumulator")
    names = ["total"] * 10_000

    request = pb.GetStateRequest(session_id="s", names=names)
    await refused(caller.stub.GetState(request), INVALID, "INVALID_INPUT")


def test_a_write_that_cannot_be_encoded_fails_alone(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/s.sqlite3", sync="normal")

    def beginning(session_id: str, next_step: int) -> Write:
        entry = Entry(session_id, "copy", "", next_step, 0.0, b"")
        return Write(session_id, NEW, next_step, 0.0, entry=entry)

    outcomes = store.commit([beginning("a", 0), beginning("b", 2**70), beginning("c", 0)])

    assert [outcome is None for outcome in outcomes] == [True, False, True]
    assert [entry.session_id for entry in store.page("", 10, "")] == ["a", "c"]
    store.close()


@pytest.mark.parametrize("num_living", [1, 5])
def test_sessions_that_have_ended_make_room_for_those_that_live(tmp_path: Path, num_living: int) -> None:
    store = open_store(f"sqlite:///{tmp_path}/s.sqlite3", sync="normal", max_bytes=2**20)

    def entry(session_id: str, next_step: int = 0, end_time_s: float | None = None) -> Entry:
        return Entry(session_id, "copy", f"r-{session_id}", next_step, 0.0, b"x" * 400, end_time_s)

    def create(session_id: str) -> object:
        return store.commit([Write(session_id, NEW, 0, 0.0, entry=entry(session_id))])[0]

    living = [f"living{number}" for number in range(num_living)]
    assert [create(session_id) for session_id in living] == [None] * num_living
    for start in range(0, 6000, 50):
        ids = [f"{number:032}" for number in range(start, start + 50)]
        assert [create(session_id) for session_id in ids] == [None] * 50
        ends = [Write(i, FIRST_FENCE, 0, 0.0, entry=entry(i, end_time_s=1.0)) for i in ids]
        assert store.commit(ends) == [None] * 50

    for step in range(100):
        records = [Write(i, FIRST_FENCE, step + 1, 0.0, record=Record(step, b"x" * 1000)) for i in living]
        outcomes = store.commit(records)
        assert outcomes == [None] * num_living, step
    assert store.look(f"{0:032}") is None
    store.close()


def test_a_store_in_memory_keeps_a_bounded_number_of_ended_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.storage.memory._MOST_ENDED", 10)
    store = open_store("none")
    for number in range(50):
        entry = Entry(str(number), "copy", f"r{number}", 0, 0.0, b"")
        store.commit([Write(str(number), NEW, 0, 0.0, entry=entry)])
        ended = Entry(str(number), "copy", f"r{number}", 0, 0.0, b"", 1.0)
        store.commit([Write(str(number), FIRST_FENCE, 0, 0.0, entry=ended)])

    assert [number for number in range(50) if store.look(str(number))] == [*range(40, 50)]
    assert [number for number in range(50) if store.find_request(f"r{number}")] == [*range(40, 50)]
    assert store.purge(float("inf")) == 10
    assert store.purge(float("inf")) == 0


def test_nobody_else_can_read_the_store(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    path.touch(0o644)
    store = open_store(f"sqlite:///{path}", sync="normal")

    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("s.sqlite3*")} == {0o600}
    store.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@h:1/0", "redis://h:1/0"),
        ("redis://h:1/0?password=secret", "redis://h:1/0"),
        ("rediss://:p@ss@h/0?password=secret&x=1", "rediss://h/0"),
        ("sqlite:///data/s", "sqlite:///data/s"),
        ("none", "none"),
    ],
)
def test_a_stores_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def ended(models: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "server", *flags, "--models", str(models), "--store", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr


def make_pipe(models: Path) -> None:
    (models / "pipe" / "1").mkdir(parents=True)
    os.mkfifo(models / "pipe" / "1" / "model.onnx")


def make_device_link(models: Path) -> None:
    (models / "zero" / "1").mkdir(parents=True)
    (models / "zero" / "1" / "model.onnx").symlink_to("/dev/zero")


def make_spec_directory(models: Path) -> None:
    (models / "accumulator" / "1" / "model_spec.json").mkdir()


@pytest.mark.parametrize("make", [make_pipe, make_device_link, make_spec_directory])
def test_what_is_no_file_is_refused_by_name_and_not_read(models: Path, make: Callable[[Path], None]) -> None:
    make(models)

    status, said = ended(models)

    assert status == 1
    assert "is not a file" in said
    assert "Traceback" not in said


def test_a_link_to_itself_is_no_model(models: Path) -> None:
    (models / "loop" / "1").mkdir(parents=True)
    (models / "loop" / "1" / "model.onnx").symlink_to("model.onnx")

    status, said = ended(models, "check-config")

    assert (status, "accumulator/1" in said, "loop" in said) == (0, True, False)


def test_check_config_says_what_is_wrong_and_starts_nothing(models: Path, tmp_path: Path) -> None:
    assert ended(models, "check-config")[0] == 0
    assert ended(models, "check-config", "--tokens", str(tmp_path / "none"))[0] == 1
    assert ended(models, "check-config", "--max-batch-size", "0")[0] == 2
    assert ended(tmp_path / "nowhere", "check-config")[0] == 1


STUCK = """
import sys, threading, time
from server import launch

def never(*args, **kwargs):
    time.sleep(10_000)
"""


def run_stuck(program: str, models: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{STUCK}{program}\nfrom server.__main__ import main\nsys.exit(main())"]
    command += ["--models", str(models), "--store", "none", "--listen", "127.0.0.1:0", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_a_model_that_does_not_return_stops_the_start_in_words(models: Path) -> None:
    done = run_stuck("launch.load_runner = never", models, "--model-load-timeout-s", "3")

    assert done.returncode == 1
    assert "was not loaded and tried out within 3.0 s" in done.stderr


def test_stopping_ends_in_time_whatever_does_not_return(models: Path) -> None:
    program = """
import os, signal
launch.ModelWatcher.keep_looking, start = None, launch.Server.start

async def keep_looking(self, every_s):
    import asyncio
    await asyncio.to_thread(never)

async def start_and_be_told_to_stop(self):
    port = await start(self)
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
    return port

launch.ModelWatcher.keep_looking = keep_looking
launch.Server.start = start_and_be_told_to_stop
"""
    done = run_stuck(program, models, "--drain-timeout-s", "1")

    assert done.returncode == EXIT_NOT_STOPPED_IN_TIME


def test_a_thread_that_dies_ends_the_process_with_a_status_to_restart_by(
    models: Path, tmp_path: Path
) -> None:
    program = """
import sys, threading, time
from server import launch
start = launch.Server.start

async def start_and_die(self):
    port = await start(self)
    threading.Thread(target=lambda: 1 / 0, name="engine").start()
    return port

launch.Server.start = start_and_die
from server.__main__ import main
sys.exit(main())
"""
    command = [
        sys.executable,
        "-c",
        program,
        "--models",
        str(models),
        "--store",
        "none",
        "--listen",
        "127.0.0.1:0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == EXIT_THREAD_DIED
    assert "a thread died" in done.stderr


async def test_a_step_that_does_not_return_fails_alone_and_its_neighbours_get_their_own_bits(
    serve: Start, tmp_path: Path
) -> None:
    step_models.write(tmp_path, step_models.endless(), "endless")
    server, address = await serve(tmp_path, step_timeout_s=0.3, max_resident_sessions=4, max_batch_size=4)
    caller = Caller(server, address)
    for name in ("endless", "neighbour", "other"):
        await caller.create("endless", name)
    inputs = random_inputs(3)
    forever = inputs.copy()
    forever[1] = 2000

    with caller.hold("endless"):  # all of them are one batch
        calls = [
            asyncio.ensure_future(caller.step(forever if name == "endless" else inputs, name, first_step=0))
            for name in ("endless", "neighbour", "other")
        ]
        while server.sessions.models.find("endless", None).num_pending < 3:
            await asyncio.sleep(0)

    await refused(calls[0], grpc.StatusCode.INTERNAL, "STEP_TIMED_OUT")
    for call in calls[1:]:
        assert (await call).tobytes() == accumulated(inputs).tobytes()
    assert (await caller.step(inputs, "endless", first_step=0)).tobytes() == accumulated(inputs).tobytes()
    await caller.channel.close()


@pytest.mark.parametrize("store", ["none", "sqlite"])
async def test_ended_ids_are_kept_up_to_a_number_and_the_oldest_go(
    serve: Start, models: Path, tmp_path: Path, store: str
) -> None:
    url = "none" if store == "none" else f"sqlite:///{tmp_path}/data/sessions.sqlite3"
    server, address = await serve(models, store=url, max_retired_ids=2)
    caller = Caller(server, address)
    for name in ("first", "second", "third", "fourth"):
        await caller.create("accumulator", name)
        await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id=name))

    await server.sessions.purge()

    for name in ("first", "second"):
        await caller.create("accumulator", name)
    for name in ("third", "fourth"):
        await refused(
            caller.create("accumulator", name), grpc.StatusCode.ALREADY_EXISTS, "SESSION_ID_RETIRED"
        )
    await caller.channel.close()


async def test_a_batch_with_a_step_that_does_not_return_is_answered_after_one_limit_or_two(
    serve: Start, tmp_path: Path
) -> None:
    step_models.write(tmp_path, step_models.endless(), "endless")
    server, address = await serve(tmp_path, step_timeout_s=0.3, max_resident_sessions=4, max_batch_size=4)
    caller = Caller(server, address)
    for name in ("a", "b"):
        await caller.create("endless", name)
    inputs = np.stack([random_inputs(32), np.full((32, 3), 2000, np.float32)])

    with structlog.testing.capture_logs() as logs:
        request = pb.BatchStepRequest(session_ids=["a", "b"], inputs=to_message(inputs))
        answer = await caller.stub.BatchStep(request)

    assert [(error.index, error.reason) for error in answer.errors] == [(1, "STEP_TIMED_OUT")]
    assert to_array(answer.outputs)[0].tobytes() == accumulated(inputs[0]).tobytes()
    assert len([entry for entry in logs if "takes too long" in entry["event"]]) <= 2
    await caller.channel.close()


async def test_long_messages_that_keep_coming_are_refused_as_short_ones_are(
    serve: Start, models: Path
) -> None:
    server, address = await serve(models, max_queue_wait_s=0.01, max_resident_sessions=256, max_batch_size=1)
    caller = Caller(server, address)
    for number in range(256):
        await caller.create("accumulator", f"s{number}")
    inputs = random_inputs(1024)
    refusals: list[str] = []

    async def keep_calling(session_id: str) -> None:
        while not refusals:
            try:
                await caller.step(inputs, session_id)
            except grpc.aio.AioRpcError as error:
                refusals.append(error.code().name)

    await asyncio.wait_for(asyncio.gather(*(keep_calling(f"s{number}") for number in range(256))), 60)

    assert {*refusals} == {"RESOURCE_EXHAUSTED"}
    await caller.channel.close()


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_a_connection_is_told_how_many_calls_it_may_have_at_a_time(
    serve: Start, models: Path, transport: str
) -> None:
    _, address = await serve(models, transport=transport)
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize())

    frame, length = Frame.parse_frame_header(memoryview(await reader.readexactly(9)))
    frame.parse_body(memoryview(await reader.readexactly(length)))

    assert isinstance(frame, SettingsFrame)
    assert frame.settings[SettingsFrame.MAX_CONCURRENT_STREAMS] == MAX_CONCURRENT_STREAMS
    writer.close()
