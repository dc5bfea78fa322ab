"""What holds for a model of one input and one output holds for one of several.

It has two inputs, an input of the session, three outputs, five states on batch axes 0 to 2, and steps that begin from
the initial state.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntm import AsyncClient, Client, InvalidInputError, RefusedError, Steps
from ntm.tensor import Array, to_message
from ntm.v1 import model_service_pb2, session_service_pb2
from server.model import spec
from server.model.spec import StepModel
from server.runtime import provider
from server.runtime.proof import plain_loop
from tests import foreign_models, step_models
from tests.conftest import ServerProcess
from tests.valkey import ValkeyServer

GOAL = np.array([0.5, -1, 2], np.float32)
CPU = provider.choose("cpu", 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    step_models.write(root, foreign_models.several(), "several")
    step_models.write(root, foreign_models.hard_wired(), "alone")
    step_models.write(root, foreign_models.scalar_of_a_session(), "scalar")
    return root


@pytest.fixture
def model(root: Path) -> StepModel:
    return spec.load(root / "several" / "1" / "model.onnx", "several", 1)


def inputs_of(num_steps: int, seed: int = 0, *axes: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        "obs": generator.uniform(-1, 1, (*axes, num_steps, 3)).astype(np.float32),
        "gain": generator.uniform(-1, 1, (*axes, num_steps, 1)).astype(np.float32),
    }


def cut(tensors: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
    return {name: array[start:stop] for name, array in tensors.items()}


def expected(
    model: StepModel, inputs: dict[str, Array], resets: Sequence[int] = (), **given: Array
) -> dict[str, Array]:
    """A plain loop of ONNX Runtime, begun anew wherever a step is reset."""
    initial = {state.input_name: spec.initial_value(state) for state in model.spec.states} | given
    num_steps = len(inputs["obs"])
    pieces = [
        plain_loop(model, CPU, model.inputs.pack(cut(inputs, start, stop)), initial)
        for start, stop in zip([0, *resets], [*resets, num_steps], strict=True)
        if start < stop
    ]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def assert_equal(some: dict[str, Array], others: dict[str, Array]) -> None:
    assert [*some] == [*others]
    for name, array in some.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)
        assert array.dtype == others[name].dtype


def mask(num_steps: int, *steps: int) -> Array:
    resets = np.zeros(num_steps, np.bool_)
    resets[[*steps]] = True
    return resets


async def test_steps_take_and_give_tensors_by_name(
    serve: Callable[..., Any], root: Path, model: StepModel
) -> None:
    _, address = await serve(root)
    inputs = inputs_of(20)

    async with AsyncClient(address) as client, await client.session("several") as session:
        outputs = await session.run(inputs)
        first = await session.step(cut(inputs_of(1, 1), 0, 1) | {k: v[0] for k, v in inputs_of(1, 1).items()})

    assert_equal(outputs, expected(model, inputs))
    assert outputs["label"].dtype == np.int64
    assert first["action"].shape == (3,)


@pytest.mark.parametrize("store", ["none", "sqlite"])
async def test_steps_that_are_reset_begin_from_what_the_session_began_from(
    serve: Callable[..., Any], root: Path, model: StepModel, store: str, tmp_path: Path
) -> None:
    _, address = await serve(root, store=store if store == "none" else f"sqlite:///{tmp_path}/s.db")
    inputs, resets = inputs_of(24), mask(24, 5, 6, 17)
    begun = {"goal": GOAL, "c": np.arange(4, dtype=np.float32)}

    async with AsyncClient(address) as client:
        own = await client.session("several", initial_state=begun)
        plain = await client.session("several")
        streamed = await client.session("several", initial_state=begun)

        outputs = await own.run(inputs, resets)
        plain_outputs = await plain.run(inputs, resets)
        chunks = [
            Steps(cut(inputs, start, start + 8), resets[start : start + 8]) for start in range(0, 24, 8)
        ]
        pieces = [piece async for piece in streamed.stream(chunks)]
        state = await own.state("goal")
        await own.reset()
        after_reset = await own.run(cut(inputs, 0, 5))

    assert_equal(outputs, expected(model, inputs, [5, 6, 17], **begun))
    assert_equal(plain_outputs, expected(model, inputs, [5, 6, 17]))
    assert_equal({name: np.concatenate([p[name] for p in pieces]) for name in outputs}, outputs)
    np.testing.assert_array_equal(state["goal"], GOAL)
    assert_equal(after_reset, cut(outputs, 0, 5))


@pytest.mark.parametrize("store", ["none", "sqlite"])
async def test_a_session_input_without_axes_is_a_sessions_own_and_outlives_a_restart(
    serve: Callable[..., Any], root: Path, store: str, tmp_path: Path
) -> None:
    url = store if store == "none" else f"sqlite:///{tmp_path}/s.db"
    server, address = await serve(root, store=url)
    inputs = np.random.default_rng(0).uniform(-1, 1, (6, 4)).astype(np.float32)
    limits = [np.array(value, np.float32) for value in (0.25, 2.0)]

    async with AsyncClient(address) as client:
        sessions = [await client.session("scalar", initial_state={"limit": limit}) for limit in limits]
        plain = await client.session("scalar")
        outputs = [await session.run(inputs) for session in [*sessions, plain]]
        kept = await sessions[0].state("limit")

    np.testing.assert_array_equal(outputs[0], outputs[2] * limits[0])
    np.testing.assert_array_equal(outputs[1], outputs[2] * limits[1])
    assert kept["limit"].shape == ()
    if store == "none":
        return
    await server.stop()
    _, address = await serve(root, store=url)
    async with AsyncClient(address) as client:
        again = await client.attach(sessions[0].session_id)
        await again.reset()
        np.testing.assert_array_equal(await again.run(inputs), outputs[0])


async def test_sessions_of_one_batch_are_reset_each_at_its_own_steps(
    serve: Callable[..., Any], root: Path, model: StepModel
) -> None:
    _, address = await serve(root)
    inputs = inputs_of(6, 3, 9)
    resets = np.random.default_rng(4).random((9, 6)) < 0.3
    goals = np.random.default_rng(5).uniform(-1, 1, (9, 3)).astype(np.float32)

    async with AsyncClient(address) as client:
        sessions = [
            await client.session("several", initial_state={"goal": goal} if row % 2 else None)
            for row, goal in enumerate(goals)
        ]
        result = await client.batch_step(sessions, inputs, resets)

    assert not result.errors
    for row in range(9):
        given = {"goal": goals[row]} if row % 2 else {}
        mine = {name: array[row] for name, array in inputs.items()}
        assert_equal(
            {name: array[row] for name, array in result.outputs.items()},
            expected(model, mine, np.flatnonzero(resets[row]).tolist(), **given),
        )


async def test_a_repeat_with_another_mask_is_refused_and_with_the_same_is_answered(
    serve: Callable[..., Any], root: Path
) -> None:
    _, address = await serve(root)
    inputs, resets = inputs_of(8), mask(8, 3)

    async with AsyncClient(address) as client, await client.session("several") as session:
        outputs = await session.run(inputs, resets)
        session.next_step = 0
        assert_equal(await session.run(inputs, resets), outputs)
        session.next_step = 0
        with pytest.raises(RefusedError, match="other inputs"):
            await session.run(inputs, mask(8, 4))


async def test_fork_export_and_import_carry_what_a_session_began_from(
    serve: Callable[..., Any], root: Path, model: StepModel, tmp_path: Path
) -> None:
    _, address = await serve(root, store=f"sqlite:///{tmp_path}/s.db")
    inputs = inputs_of(9)

    async with AsyncClient(address) as client:
        session = await client.session("several", initial_state={"goal": GOAL})
        await session.run(inputs_of(5, 7))
        others = [await session.fork(), await client.import_session(await session.export())]
        outputs = [await other.run(inputs, mask(9, 0)) for other in [session, *others]]

    for output in outputs:
        assert_equal(output, expected(model, inputs, goal=GOAL))


async def test_a_trace_has_the_state_after_every_step(serve: Callable[..., Any], root: Path) -> None:
    _, address = await serve(root)
    inputs, resets = inputs_of(7), mask(7, 4)

    async with AsyncClient(address) as client:
        traced, stepped = await client.session("several"), await client.session("several")
        trace = await traced.trace(inputs, ["h", "tail", "count"], resets)
        one_by_one, states = [], []
        for step in range(7):
            one_by_one.append(await stepped.run(cut(inputs, step, step + 1), resets[step : step + 1]))
            states.append(await stepped.state("h", "tail", "count"))

    assert_equal(trace.outputs, {n: np.concatenate([o[n] for o in one_by_one]) for n in trace.outputs})
    assert_equal(trace.state, {name: np.stack([state[name] for state in states]) for name in trace.state})


async def test_a_creation_is_repeated_with_the_same_values_only(
    serve: Callable[..., Any], root: Path
) -> None:
    server, _ = await serve(root)
    create = server.sessions.create
    first = await create("several", None, "s", "r", {"goal": GOAL})

    again = await create("several", None, "s", "r", {"goal": GOAL})
    assert again.session_id == first.session_id
    with pytest.raises(Exception, match="came before with another request"):
        await create("several", None, "s", "r", {"goal": GOAL + 1})


@pytest.mark.parametrize(
    ("initial_state", "complaint"),
    [
        ({"h": np.zeros((2, 3), np.float32)}, r"initial_state\[h\].shape: \[2, 3\] must be \[3, 2\]"),
        ({"goal": np.full(3, np.nan, np.float32)}, "not finite"),
    ],
)
async def test_a_value_that_does_not_fit_is_refused_by_its_name(
    serve: Callable[..., Any], root: Path, initial_state: dict[str, Array], complaint: str
) -> None:
    _, address = await serve(root)

    async with AsyncClient(address) as client:
        with pytest.raises(InvalidInputError, match=complaint):
            await client.session("several", initial_state=initial_state)
        with pytest.raises(ValueError, match="no state of the model"):
            await client.session("several", initial_state={"nothing": GOAL})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda named: named.pop(), "input 'gain' is missing"),
        (lambda named: named.add(name="more", value=named[0].value), "'more' is no input of a step"),
        (lambda named: named[1].value.CopyFrom(to_message(np.zeros((4, 2), np.float32))), "input 'gain'"),
        (
            lambda named: named[1].value.CopyFrom(to_message(np.zeros((3, 1), np.float32))),
            "as many as of the other",
        ),
        (lambda named: named[0].value.CopyFrom(to_message(np.zeros((4, 3)))), "FP64 must be FP32"),
        (
            lambda named: named[0].value.CopyFrom(to_message(np.full((4, 3), np.inf, np.float32))),
            r"named_inputs\[obs\]",
        ),
    ],
)
async def test_an_error_names_the_input_at_fault(
    serve: Callable[..., Any], root: Path, change: Callable[[Any], None], complaint: str
) -> None:
    _, address = await serve(root)
    request = session_service_pb2.StepRequest(session_id="s")
    for name, array in inputs_of(4).items():
        request.named_inputs.add(name=name, value=to_message(array))
    change(request.named_inputs)

    async with AsyncClient(address) as client:
        await client.session("several", session_id="s")
        with pytest.raises(InvalidInputError, match=complaint):
            await client._call(client._sessions.Step, request, "s")


async def test_a_model_that_takes_one_session_at_a_time_is_told_as_such_and_runs_in_batches(
    serve: Callable[..., Any], root: Path
) -> None:
    _, address = await serve(root)
    alone = spec.load(root / "alone" / "1" / "model.onnx", "alone", 1)
    inputs = np.random.default_rng(0).uniform(-1, 1, (7, 5, 2, 2)).astype(np.float32)

    async with AsyncClient(address) as client:
        execution = (await client.model("alone")).execution
        result = await client.batch_step([await client.session("alone") for _ in range(7)], inputs)

    assert execution.batching == model_service_pb2.BATCHING_ROW_BY_ROW
    assert execution.batch_invariant
    assert 0 < execution.step_alone_s < execution.step_of_full_batch_s
    for row in range(7):
        loop = plain_loop(alone, CPU, alone.inputs.pack({"x": inputs[row]}))
        np.testing.assert_array_equal(result.outputs[row], loop["y"])


def test_sessions_outlive_a_kill_and_more_of_them_than_fit(
    root: Path, model: StepModel, start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    store, inputs, resets = f"sqlite:///{tmp_path}/s.db", inputs_of(12), mask(12, 2, 9)
    flags = ["--max-resident-sessions", "2", "--max-batch-size", "2"]
    server = start_server(root, *flags, store=store)
    goals = [GOAL * number for number in range(1, 6)]
    with Client(server.address) as client:
        for number, goal in enumerate(goals):
            session = client.session("several", session_id=f"s{number}", initial_state={"goal": goal})
            session.run(cut(inputs, 0, 8), resets[:8])
        server.signal(signal.SIGKILL)
        server.wait()
    server = start_server(root, *flags, store=store)
    with Client(server.address) as client:
        for number, goal in enumerate(goals):
            session = client.attach(f"s{number}")
            assert session.next_step == 8

            outputs = session.run(cut(inputs, 8, 12), resets[8:])

            assert_equal(outputs, cut(expected(model, inputs, [2, 9], goal=goal), 8, 12))


@pytest.fixture(params=["none", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty store."""
    if request.param != "redis":
        yield "none" if request.param == "none" else f"sqlite:///{tmp_path}/s.db"
        return
    server = ValkeyServer(tmp_path / "valkey")
    server.start()
    yield server.url
    server.stop()


@pytest.mark.parametrize("seed", range(3))
async def test_random_histories_of_more_sessions_than_fit_are_those_of_a_plain_loop(
    serve: Callable[..., Any], root: Path, model: StepModel, store: str, seed: int
) -> None:
    """Steps with resets, repeats of them, resets, forks, exports and imports, in any order, two sessions in memory
    where there is a store for the others."""
    _, address = await serve(
        root,
        store=store,
        sync="normal",
        max_resident_sessions=64 if store == "none" else 2,
        max_batch_size=2,
        snapshot_every_steps=7,
    )
    generator = np.random.default_rng(seed)
    pool, used = inputs_of(2000, seed), 0
    histories: list[dict[str, Any]] = []
    async with AsyncClient(address) as client:
        for number in range(4):
            goal = np.full(3, number, np.float32)
            session = await client.session("several", initial_state={"goal": goal} if number else None)
            given = {"goal": goal} if number else {}
            histories.append({"session": session, "given": given, "inputs": [], "resets": [], "outputs": []})
        for _ in range(60):
            history = histories[generator.integers(len(histories))]
            session, length = history["session"], int(generator.integers(1, 6))
            match generator.choice(["step", "step", "step", "repeat", "reset", "fork", "import"]):
                case "step" | "repeat" as action:
                    inputs, resets = cut(pool, used, used + length), generator.random(length) < 0.15
                    used += length
                    first_step = session.next_step
                    outputs = await session.run(inputs, resets)
                    if action == "repeat":
                        session.next_step = first_step
                        assert_equal(await session.run(inputs, resets), outputs)
                    history["resets"] += (first_step + np.flatnonzero(resets)).tolist()
                    history["inputs"].append(inputs)
                    history["outputs"].append(outputs)
                case "reset":
                    await session.reset()
                    history["resets"].append(session.next_step)
                case action:
                    forks = action == "fork"
                    other = await (session.fork() if forks else client.import_session(await session.export()))
                    copied = {key: [*history[key]] for key in ("inputs", "resets", "outputs")}
                    histories.append({"session": other, "given": history["given"], **copied})

    for history in histories:
        if history["inputs"]:
            inputs = {name: np.concatenate([part[name] for part in history["inputs"]]) for name in pool}
            ran = {n: np.concatenate([part[n] for part in history["outputs"]]) for n in history["outputs"][0]}
            begins = sorted({step for step in history["resets"] if 0 < step < len(inputs["obs"])})
            assert_equal(ran, expected(model, inputs, begins, **history["given"]))
