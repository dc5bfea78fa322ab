"""What the inspector and its watchers cost: `python -m benchmarks.inspecting`, two minutes on an idle machine.

- The page in a real Chromium: frames a second while a memory of 64 × 1024 is played, and the longest pause while 1000
  steps of it, and of the copy model, are scrubbed by mouse.
- Single steps of one session, one after another, watched by ten watchers that hardly read, against unwatched.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from benchmarks.server_process import MODELS, serving
from ntm import AsyncClient
from ntm.v1 import model_pb2, tensor_pb2

ROWS, COLUMNS = 64, 1024
NUM_STEPS = 1000
NUM_WATCHERS = 10
WARM_UP_STEPS = 1000
ROUNDS = 5
ROUND_S = 3.0
SWEEP_MOVES = 120

_PROBE = """() => {
    const seen = window.seen = { frames: [], late: 0 };
    let since = performance.now();
    const tick = (now) => {
        seen.frames.push(now);
        const { moment, drawn } = document.documentElement.dataset;
        if (moment === drawn) since = now;
        seen.late = Math.max(seen.late, now - since);
        requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
}"""


def main() -> int:
    """Measure, and print a table."""
    table = Table("what", "measured")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models = Path(folder)
        write_large_model(models)
        address, _ = stack.enter_context(serving(models))
        copy_address, _ = stack.enter_context(serving(MODELS))
        rows = [*in_a_page(address, "large", "64 × 1024"), *in_a_page(copy_address, "copy", "copy model")]
        for row in [*rows, *asyncio.run(watched(copy_address))]:
            table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def write_large_model(models: Path) -> None:
    """A memory of 64 × 1024 that decays and takes each input in at a row of its own."""
    weights = np.random.default_rng(0).uniform(-1, 1, (8, COLUMNS)).astype(np.float32)
    rows = np.random.default_rng(1).uniform(0, 1, (8, ROWS)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["wide"]),
        helper.make_node("MatMul", ["x", "rows"], ["places"]),
        helper.make_node("Softmax", ["places"], ["next_attention"], axis=1),
        helper.make_node("Unsqueeze", ["next_attention", "two"], ["tall"]),
        helper.make_node("Unsqueeze", ["wide", "one"], ["flat"]),
        helper.make_node("Mul", ["tall", "flat"], ["written"]),
        helper.make_node("Mul", ["memory", "decay"], ["kept"]),
        helper.make_node("Add", ["kept", "written"], ["next_memory"]),
        helper.make_node("Identity", ["x"], ["y"]),
    ]
    constants = {
        "weights": weights,
        "rows": rows * 4,
        "decay": np.float32(0.97),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
    }
    value = helper.make_tensor_value_info
    shapes: dict[str, list[Any]] = {"memory": [ROWS, COLUMNS], "attention": [ROWS]}
    graph = helper.make_graph(
        nodes,
        "step",
        [value("x", TensorProto.FLOAT, ["b", 8])]
        + [value(name, TensorProto.FLOAT, ["b", *shape]) for name, shape in shapes.items()],
        [value("y", TensorProto.FLOAT, ["b", 8])]
        + [value(f"next_{name}", TensorProto.FLOAT, ["b", *shape]) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    fp32 = tensor_pb2.DATA_TYPE_FP32
    roles = {"memory": model_pb2.STATE_ROLE_MEMORY, "attention": model_pb2.STATE_ROLE_WRITE_WEIGHTING}
    spec = model_pb2.ModelSpec(
        name="large",
        inputs=[model_pb2.TensorSpec(name="x", dtype=fp32, shape=[8])],
        outputs=[model_pb2.TensorSpec(name="y", dtype=fp32, shape=[8])],
        states=[
            model_pb2.StateSpec(
                input_name=name,
                output_name=f"next_{name}",
                role=roles[name],
                dtype=fp32,
                shape=shape,
                fill=0.0,
            )
            for name, shape in shapes.items()
        ],
    )
    helper.set_model_props(model, {"ntm.v1.ModelSpec": json_format.MessageToJson(spec)})
    path = models / "large" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(model.SerializeToString())


def in_a_page(address: str, model: str, name: str) -> Iterator[tuple[str, str]]:
    """Play and scrub a session of 1000 steps in Chromium; gives the rows of the table."""
    from playwright.sync_api import sync_playwright

    with inspector(address) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        wait(page, "!document.getElementById('new-session').disabled")
        page.select_option("#model", label=model)
        page.click("#new-session")
        wait(page, "!document.getElementById('session').hidden")
        page.select_option("#kind", "random")
        page.fill("#parameter-steps", str(NUM_STEPS))
        page.click("#load")
        wait(page, "!document.getElementById('run').disabled")
        page.click("#run")
        wait(page, f"document.documentElement.dataset.drawn === '{NUM_STEPS}'")

        page.click("#first")
        page.select_option("#rate", "60")
        page.click("#play")
        time.sleep(2)
        counts = []
        for _ in range(6):
            time.sleep(1)
            counts.append(int(page.evaluate("document.documentElement.dataset.framesPerSecond")))
        page.click("#play")
        yield f"{name}: frames drawn in a second, asked for 60", f"{min(counts)} to {max(counts)}"

        page.evaluate(_PROBE)
        box = page.locator("#scrub").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 1, box["y"] + 10)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 10, steps=SWEEP_MOVES)
        page.mouse.move(box["x"] + 1, box["y"] + 10, steps=SWEEP_MOVES)
        page.mouse.up()
        wait(page, "document.documentElement.dataset.drawn !== ''")
        frames, late = page.evaluate("[window.seen.frames, window.seen.late]")
        longest = max(np.diff(frames))
        yield f"{name}: longest pause between two frames, {NUM_STEPS} steps scrubbed", f"{longest:.0f} ms"
        yield f"{name}: longest time for which a moment was not drawn", f"{late:.0f} ms"
        browser.close()


@contextmanager
def inspector(address: str) -> Iterator[str]:
    """The inspector as a process; gives its page's address."""
    command = [sys.executable, "-m", "inspector", address, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  # nosec B603  # a command of our own
    assert process.stdout is not None
    try:
        found = re.search(r"https?://\S+", process.stdout.readline())
        assert found
        yield found[0]
    finally:
        process.terminate()
        process.communicate()


def wait(page: Any, expression: str) -> None:
    """Until an expression is true in the page."""
    while not page.evaluate(expression):
        time.sleep(0.02)


async def watched(address: str) -> list[tuple[str, str]]:
    """Steps a second of one session, watched and unwatched in turn; the ratio's median and spread over the rounds."""
    ratios, rates = [], []
    async with AsyncClient(address) as client, AsyncClient(address) as other:
        session = await client.session("copy")
        inputs = np.zeros(9, np.float32)
        names = [state.input_name for state in session.model.spec.states]
        for number in range(ROUNDS):
            measured = {}
            for is_watched in (True, False) if number % 2 else (False, True):
                watchers = []
                if is_watched:
                    attached = await other.attach(session.session_id)
                    watchers = [asyncio.create_task(slowly(attached, names)) for _ in range(NUM_WATCHERS)]
                    await asyncio.sleep(0.5)
                    for _ in range(
                        WARM_UP_STEPS
                    ):  # until what may wait for the watchers, here and on the way, is full
                        await session.step(inputs)
                measured[is_watched] = await steps_per_s(session)
                for watcher in watchers:
                    watcher.cancel()
                await asyncio.gather(*watchers, return_exceptions=True)
            ratios.append(measured[True] / measured[False])
            rates.append(measured[False])
        await session.delete()
    spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {ROUNDS} rounds"
    return [
        ("single steps a second of one session, unwatched", f"{statistics.median(rates):.0f}"),
        (
            f"the same with {NUM_WATCHERS} slow watchers, as a share",
            f"{statistics.median(ratios):.3f} ({spread})",
        ),
    ]


async def slowly(session: Any, names: list[str]) -> None:
    """Watch, and take one message a second."""
    async for _ in session.watch(*names):
        await asyncio.sleep(1)


async def steps_per_s(session: Any) -> float:
    """Single steps, each sent when the one before was answered."""
    inputs = np.zeros(9, np.float32)
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() - start_s < ROUND_S:
        await session.step(inputs)
        count += 1
    return count / (time.perf_counter() - start_s)


if __name__ == "__main__":
    sys.exit(main())
