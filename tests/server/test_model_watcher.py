"""Models that come, go and change while the server runs.

Most tests call for each look into the models directory themselves; the others let the server look every few
milliseconds, and wait for what it says.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from ntm.v1 import model_service_pb2, model_service_pb2_grpc
from ntm.v1 import session_service_pb2 as pb
from server.errors import StoreUnavailableError
from server.model import spec
from tests import step_models
from tests.server.helpers import GONE, ORDER, Caller, Start, accumulated, pending, random_inputs, refused

READY, LEAVING = model_service_pb2.MODEL_STATE_READY, model_service_pb2.MODEL_STATE_LEAVING
Log = list[MutableMapping[str, Any]]
Serve = Callable[..., Awaitable[Caller]]


@pytest.fixture
def log() -> Iterator[Log]:
    with capture_logs() as entries:
        yield entries


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models directory with an accumulator as test/1; a delay line, as test/2, gives other outputs."""
    step_models.write(tmp_path / "models", step_models.accumulator())
    return tmp_path / "models"


@pytest_asyncio.fixture
async def start(serve: Start, root: Path, tmp_path: Path) -> AsyncIterator[Serve]:
    """Start a server that looks into the models directory when told to, or every `model_poll_s`."""
    callers: list[Caller] = []

    async def one(store: str = "none", **settings: Any) -> Caller:
        url = "none" if store == "none" else f"sqlite:///{tmp_path}/sessions.sqlite3"
        settings = {"model_poll_s": 3600, "max_resident_sessions": 4, "max_batch_size": 4, **settings}
        callers.append(Caller(*await serve(root, store=url, **settings)))
        return callers[-1]

    yield one
    for caller in callers:
        await caller.channel.close()


@pytest.fixture(params=["none", "sqlite"])
def store(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


async def look(caller: Caller, times: int = 1) -> None:
    for _ in range(times):
        await caller.server.model_watcher.look()


async def said(log: Log, event: str, model: str) -> None:
    """Wait until the log says something of a model."""
    async with asyncio.timeout(30):
        while not any(entry["event"] == event and entry["model"] == model for entry in log):
            await asyncio.sleep(0.005)


async def unloaded(caller: Caller, log: Log, model: str = "test/1") -> None:
    """Look until a model is unloaded: sessions that are on their way out take their time."""
    async with asyncio.timeout(30):
        while not any(entry["event"] == "model unloaded" and entry["model"] == model for entry in log):
            await look(caller)
            await asyncio.sleep(0)


def errors(log: Log) -> list[str]:
    return [entry["event"] for entry in log if entry["log_level"] == "error"]


async def listed(caller: Caller) -> list[tuple[str, int, int]]:
    stub: Any = model_service_pb2_grpc.ModelServiceStub(caller.channel)
    models = (await stub.ListModels(model_service_pb2.ListModelsRequest())).models
    return [(model.name, model.version, model.state) for model in models]


def metrics(caller: Caller) -> str:
    return generate_latest(caller.server.metrics.registry).decode()


def remove(root: Path, version: int = 1) -> None:
    shutil.rmtree(root / "test" / str(version))


# A version appears.


async def test_a_version_that_appears_is_taken_by_new_sessions_and_old_ones_keep_theirs(
    start: Serve, root: Path, log: Log, store: str
) -> None:
    caller, inputs = await start(store, model_poll_s=0.02), random_inputs(4)
    await caller.create("test", "old")
    await caller.step(inputs[:2], "old")

    step_models.write(root, step_models.delay_line(), version=2)
    await said(log, "model loaded", "test/2")

    assert (await caller.create("test", "new")).model_version == 2
    assert (await caller.create("test", "chosen", model_version=1)).model_version == 1
    np.testing.assert_array_equal(await caller.step(inputs[2:], "old"), accumulated(inputs)[2:])
    np.testing.assert_array_equal((await caller.step(inputs, "new"))[2:], inputs[:2])
    assert await listed(caller) == [("test", 2, READY), ("test", 1, READY)]


async def test_sessions_keep_their_version_when_the_server_starts_again(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start("sqlite"), random_inputs(4)
    await caller.create("test", "old")
    await caller.step(inputs[:2], "old")
    step_models.write(root, step_models.delay_line(), version=2)
    await look(caller, 2)
    await caller.create("test", "new")
    await caller.step(inputs[:2], "new")
    await caller.server.stop()

    caller = await start("sqlite")

    np.testing.assert_array_equal(await caller.step(inputs[2:], "old"), accumulated(inputs)[2:])
    np.testing.assert_array_equal(await caller.step(inputs[2:], "new"), inputs[:2])


async def test_steps_go_on_while_a_version_is_loaded(start: Serve, root: Path) -> None:
    caller, inputs = await start(), random_inputs(20)
    await caller.create("test")
    updates = caller.server.model_watcher
    load, is_loading, may_load = updates._load, threading.Event(), threading.Event()

    def held(model: spec.StepModel) -> Any:
        is_loading.set()
        assert may_load.wait(30)
        return load(model)

    updates._load = held
    step_models.write(root, step_models.delay_line(), version=2)
    await look(caller)
    looking = asyncio.ensure_future(look(caller))
    await asyncio.to_thread(is_loading.wait, 30)

    outputs = [await caller.step(row[np.newaxis]) for row in inputs]
    assert await listed(caller) == [("test", 1, READY)]
    may_load.set()
    await looking

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))
    assert await listed(caller) == [("test", 2, READY), ("test", 1, READY)]


async def test_a_file_that_is_being_written_is_left_alone_until_it_is_whole(
    start: Serve, root: Path, log: Log
) -> None:
    caller, content = await start(), step_models.delay_line()
    path = step_models.write(root, b"", version=2)

    for end in (len(content) // 3, len(content) // 2, len(content)):
        path.write_bytes(content[:end])
        await look(caller)
        assert await listed(caller) == [("test", 1, READY)]
    await look(caller)

    assert await listed(caller) == [("test", 2, READY), ("test", 1, READY)]
    assert errors(log) == []


async def test_a_file_that_changes_while_it_is_read_is_read_again_without_a_word(
    start: Serve, root: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, content = await start(), step_models.delay_line()
    path = step_models.write(root, content[:99], version=2)
    await look(caller)

    def read_too_early(*arguments: Any) -> spec.StepModel:
        try:
            return load(*arguments)
        finally:
            path.write_bytes(content)

    load = spec.load
    with monkeypatch.context() as patch:
        patch.setattr(spec, "load", read_too_early)
        log.clear()
        await look(caller)
        assert log == []
    await look(caller, 2)

    assert [entry["event"] for entry in log] == ["model loaded"]


# Files that cannot be served.


async def test_a_file_that_cannot_be_served_disturbs_no_other_and_is_tried_again_when_it_changes(
    start: Serve, root: Path, log: Log
) -> None:
    caller = await start()
    bad = step_models.write(root, b"junk", version=2)
    step_models.write(root, step_models.delay_line(), version=3)
    log.clear()

    await look(caller, 4)

    (complaint,) = [entry for entry in log if entry["log_level"] == "error"]
    assert (complaint["model"], f"{bad} cannot be served" in complaint["error"]) == ("test/2", True)
    assert await listed(caller) == [("test", 3, READY), ("test", 1, READY)]
    assert 'ntm_model_file_problem{model="test/2",problem="load_failed"} 1.0' in metrics(caller)

    bad.write_bytes(step_models.logarithm())
    await look(caller, 2)

    assert await listed(caller) == [("test", 3, READY), ("test", 2, READY), ("test", 1, READY)]
    assert "ntm_model_file_problem{" not in metrics(caller)


async def test_a_model_that_the_device_has_no_memory_for_is_one_that_cannot_be_served(
    start: Serve, root: Path, log: Log
) -> None:
    caller = await start()

    def too_much(model: spec.StepModel) -> Any:
        raise MemoryError("no room for the pools")

    caller.server.model_watcher._load = too_much
    step_models.write(root, step_models.delay_line(), version=2)
    await look(caller, 3)

    assert errors(log).count("a model cannot be served; it is tried again when its file changes") == 1
    await caller.create("test")
    assert len(await caller.step(random_inputs(2))) == 2


async def test_a_directory_that_is_no_version_is_named_once_and_forgotten_when_it_is_gone(
    start: Serve, root: Path, log: Log
) -> None:
    caller = await start()
    (root / "test" / "latest").mkdir()
    shutil.copy(root / "test" / "1" / "model.onnx", root / "test" / "latest")

    await look(caller, 4)
    (complaint,) = [entry for entry in log if entry["log_level"] == "error"]
    assert "'latest' is not a version" in complaint["error"]
    assert 'model="test/latest"' in metrics(caller)
    shutil.rmtree(root / "test" / "latest")
    await look(caller)

    assert "test/latest" not in metrics(caller)


async def test_a_models_directory_that_is_missing_is_a_fault_and_everything_stays(
    start: Serve, root: Path, log: Log
) -> None:
    caller = await start()
    await caller.create("test")

    shutil.move(root, root.with_name("unmounted"))
    await look(caller, 3)

    assert errors(log).count("the models directory cannot be read; what is served stays") == 1
    assert await listed(caller) == [("test", 1, READY)]
    assert len(await caller.step(random_inputs(2))) == 2


# Files that change under their sessions.


async def test_a_file_changed_in_place_is_not_swapped_under_its_sessions(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start(), random_inputs(4)
    await caller.create("test")
    await caller.step(inputs[:2])
    path = root / "test" / "1" / "model.onnx"

    path.write_bytes(step_models.delay_line())
    await look(caller, 4)

    (complaint,) = [entry for entry in log if entry["log_level"] == "error"]
    assert "publish the new file under a new version" in complaint["event"]
    assert 'ntm_model_file_problem{model="test/1",problem="changed_in_place"} 1.0' in metrics(caller)
    np.testing.assert_array_equal(await caller.step(inputs[2:]), accumulated(inputs)[2:])
    assert await listed(caller) == [("test", 1, READY)]

    path.write_bytes(step_models.accumulator())
    await look(caller, 2)

    assert "ntm_model_file_problem{" not in metrics(caller)


async def test_the_same_file_copied_anew_is_no_change(start: Serve, root: Path, log: Log) -> None:
    caller, path = await start(), root / "test" / "1" / "model.onnx"

    path.unlink()
    path.write_bytes(step_models.accumulator())
    await look(caller, 3)

    assert errors(log) == []
    assert await listed(caller) == [("test", 1, READY)]


# A version is removed.


async def test_a_removed_version_serves_its_sessions_takes_no_new_ones_and_goes_when_they_have_ended(
    start: Serve, root: Path, log: Log, store: str
) -> None:
    caller, inputs = await start(store), random_inputs(4)
    await caller.create("test", request_id="r")
    await caller.step(inputs[:2])
    served = caller.server.sessions.models.find("test", 1)
    pool = weakref.ref(next(iter(served.runner._pools.values())))

    remove(root)
    await look(caller, 3)

    assert await listed(caller) == [("test", 1, LEAVING)]
    await refused(caller.create("test", "n", model_version=1), ORDER, "MODEL_LEAVING")
    await refused(caller.create("test", "n"), GONE, "MODEL_NOT_FOUND")
    fork = pb.ForkSessionRequest(source_session_id="s", session_id="f")
    await refused(caller.stub.ForkSession(fork), ORDER, "MODEL_LEAVING")
    assert (await caller.create("test", request_id="r")).next_step == 2
    np.testing.assert_array_equal(await caller.step(inputs[2:]), accumulated(inputs)[2:])

    await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
    await unloaded(caller, log)

    assert await listed(caller) == []
    assert not served.engine._thread.is_alive()
    assert pool() is None
    assert 'model="test/1"' not in metrics(caller)
    await refused(caller.create("test", "n", model_version=1), GONE, "MODEL_NOT_FOUND")
    health = await health_pb2_grpc.HealthStub(caller.channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING

    step_models.write(root, step_models.delay_line())
    await look(caller, 2)

    await caller.create("test", "n")
    np.testing.assert_array_equal((await caller.step(inputs, "n"))[2:], inputs[:2])


async def test_a_removed_version_waits_for_sessions_that_are_only_in_the_store(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start("sqlite", max_resident_sessions=1), random_inputs(4)
    for session_id in ("a", "b", "c"):
        await caller.create("test", session_id)
        await caller.step(inputs[:2], session_id)
    step_models.write(root, step_models.delay_line(), version=2)
    await look(caller, 2)
    await caller.create("test", "other")

    remove(root)
    for session_id in ("a", "c", "b"):
        await look(caller, 2)
        np.testing.assert_array_equal(await caller.step(inputs[2:], session_id), accumulated(inputs)[2:])
        await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id))
    await unloaded(caller, log)

    assert await listed(caller) == [("test", 2, READY)]


async def test_while_the_store_does_not_answer_a_removed_version_stays_and_new_ones_come_all_the_same(
    start: Serve, root: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await start("sqlite")
    remove(root)
    step_models.write(root, step_models.delay_line(), version=2)

    def unavailable(*_: Any) -> Any:
        raise StoreUnavailableError

    with monkeypatch.context() as patch:
        patch.setattr(caller.server.sessions.store.backend, "page", unavailable)
        await look(caller, 3)
        assert await listed(caller) == [("test", 2, READY), ("test", 1, LEAVING)]
    await unloaded(caller, log)

    assert await listed(caller) == [("test", 2, READY)]


async def test_a_removed_version_that_comes_back_in_time_stays(
    start: Serve, root: Path, log: Log, store: str
) -> None:
    caller, inputs = await start(store), random_inputs(4)
    await caller.create("test")
    await caller.step(inputs[:2])

    remove(root)
    await look(caller)
    assert await listed(caller) == [("test", 1, LEAVING)]
    step_models.write(root, step_models.accumulator())
    await look(caller, 2)

    assert await listed(caller) == [("test", 1, READY)]
    await caller.create("test", "n")
    np.testing.assert_array_equal(await caller.step(inputs[2:]), accumulated(inputs)[2:])


async def test_another_file_in_the_place_of_a_removed_one_is_served_when_the_old_sessions_have_ended(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start(), random_inputs(4)
    await caller.create("test")
    remove(root)
    await look(caller)

    step_models.write(root, step_models.delay_line())
    await look(caller, 3)
    await refused(caller.create("test", "n", model_version=1), ORDER, "MODEL_LEAVING")
    np.testing.assert_array_equal(await caller.step(inputs), accumulated(inputs))
    await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
    await unloaded(caller, log)
    await look(caller)

    await caller.create("test", "n")
    np.testing.assert_array_equal((await caller.step(inputs, "n"))[2:], inputs[:2])
    assert "ntm_model_file_problem{" not in metrics(caller)


async def test_when_its_time_is_up_its_sessions_wait_in_the_store_until_it_is_back(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start("sqlite", unload_after_s=1e-6), random_inputs(6)
    for session_id in ("a", "b"):
        await caller.create("test", session_id)
        await caller.step(inputs[:2], session_id)
    remove(root)

    with caller.hold("test"):
        step = asyncio.ensure_future(caller.step(inputs[2:4], "a"))
        await pending(caller, "test", 1)
        await look(caller, 2)
    np.testing.assert_array_equal(await step, accumulated(inputs)[2:4])
    await unloaded(caller, log)

    for session_id in ("a", "b"):
        await refused(caller.step(inputs[:1], session_id), ORDER, "MODEL_NOT_LOADED")
    assert await caller.next_step("a") == 4
    step_models.write(root, step_models.accumulator())
    await look(caller, 2)
    np.testing.assert_array_equal(await caller.step(inputs[4:], "a", first_step=4), accumulated(inputs)[4:])
    np.testing.assert_array_equal(await caller.step(inputs[:2], "b", first_step=0), accumulated(inputs)[:2])


async def test_a_session_whose_state_could_not_be_read_is_given_to_the_store_at_a_later_look(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start("sqlite", unload_after_s=1e-6), random_inputs(4)
    await caller.create("test")
    await caller.step(inputs[:2])
    runner = caller.server.sessions.models.find("test", 1).runner
    read = runner.read

    def fail_once(slots: np.ndarray) -> dict[str, np.ndarray]:
        runner.read = read  # type: ignore[method-assign]
        raise RuntimeError("the device did not answer")

    runner.read = fail_once  # type: ignore[method-assign]
    remove(root)
    await unloaded(caller, log)

    assert errors(log) == ["a batch failed"]
    step_models.write(root, step_models.accumulator())
    await look(caller, 2)
    np.testing.assert_array_equal(await caller.step(inputs[2:], first_step=2), accumulated(inputs)[2:])


async def test_when_its_time_is_up_its_sessions_end_where_there_is_no_store(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start(unload_after_s=1e-6, max_resident_sessions=2), random_inputs(4)
    await caller.create("test", "a")
    await caller.create("test", "b")
    remove(root)

    with caller.hold("test"):
        step = asyncio.ensure_future(caller.step(inputs, "a"))
        await pending(caller, "test", 1)
        await look(caller, 3)
    np.testing.assert_array_equal(await step, accumulated(inputs))
    await unloaded(caller, log)

    for session_id in ("a", "b"):
        await refused(caller.step(inputs, session_id), GONE, "SESSION_EXPIRED")


async def test_a_server_stops_in_good_order_while_a_version_is_on_its_way_out(
    start: Serve, root: Path, log: Log
) -> None:
    caller, inputs = await start(unload_after_s=1e-6), random_inputs(4)
    await caller.create("test")
    remove(root)

    with caller.hold("test"):
        step = asyncio.ensure_future(caller.step(inputs))
        await pending(caller, "test", 1)
        await look(caller, 2)
        stopping = asyncio.ensure_future(caller.server.stop())
        await asyncio.sleep(0)

    np.testing.assert_array_equal(await step, accumulated(inputs))
    await stopping
    assert log[-1]["event"] == "stopped"


async def test_a_model_that_does_not_return_is_given_up_and_the_others_are_looked_after(
    start: Serve, root: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await start()
    watcher = caller.server.model_watcher
    returns = threading.Event()
    load = watcher._load

    def stuck_for_one(model: spec.StepModel) -> Any:
        if model.name == "stuck":
            returns.wait(60)
        return load(model)

    monkeypatch.setattr(watcher, "_load", stuck_for_one)
    monkeypatch.setattr(watcher, "_load_timeout_s", 0.5)
    step_models.write(root, step_models.accumulator(), "stuck")
    step_models.write(root, step_models.accumulator(), "well")

    await look(caller, times=3)
    returns.set()

    await caller.create("well")
    assert any("within 0.5 s" in str(entry.get("error")) and entry["model"] == "stuck/1" for entry in log)
