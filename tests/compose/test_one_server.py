"""The default set: one server on the shipped models, SQLite on a volume, and the images that it is made of."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from ntm import Client
from tests.compose.compose import Compose, crash_server, docker, health, inspect, wait_until
from tests.compose.load import MODEL, Account, load
from tests.conftest import ROOT

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]

OWN_LAYERS_MB = 200
HEALTHY_S = 30


@pytest.fixture(scope="module")
def one(start_project: Callable[..., Compose]) -> Compose:
    """The server, healthy."""
    project = start_project("one")
    start_s = time.monotonic()
    project.run("up", "--detach", "--wait")
    elapsed_s = time.monotonic() - start_s
    print(f"\ndocker compose up --wait: healthy after {elapsed_s:.1f} s")
    assert elapsed_s < HEALTHY_S
    return project


def image_mb(image: str) -> float:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image)) / 1e6


def test_the_server_image_holds_no_torch_no_compiler_and_no_pip_of_its_own() -> None:
    base = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("FROM"))
    added_mb = image_mb("ntm-server") - image_mb(base.split()[1])
    print(
        f"\nntm-server: {image_mb('ntm-server'):.0f} MB here, {added_mb:.0f} of them on top of the base image"
    )
    search = "command -v gcc g++ cc; ls /opt/venv/lib/python*/site-packages | grep -xiE 'torch|pip|training|export'"
    found = docker("run", "--rm", "--entrypoint", "sh", "ntm-server", "-c", search, check=False)

    assert found == ""
    assert added_mb < OWN_LAYERS_MB
    assert inspect_image("ntm-server", "{{.Config.User}}") == "10001:10001"


def inspect_image(image: str, what: str) -> str:
    return docker("image", "inspect", "--format", what, image).strip()


def test_the_readmes_client_lines_recall_a_sequence_without_an_error(one: Compose) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    credentials = 'tls=Tls("{}"), token="{}"'.format(
        one.credentials["tls"].authorities, one.credentials["token"]
    )
    program = program.replace('"127.0.0.1:50051"', f'"{one.address}", {credentials}')
    ended = subprocess.run(
        [sys.executable, "-c", f"from ntm import Tls\n{program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    assert set(re.findall(r"-?\d", ended.stdout)) == {"0"}


def test_the_demo_recalls_every_bit_through_the_server(one: Compose) -> None:
    said = one.run("run", "--rm", "demo")

    assert re.findall(r"│ (\d+) +│ \d+ +│ \d+ +│ (\d+) ", said) == [("20", "0"), ("100", "0"), ("1000", "0")]


def test_the_container_cannot_write_but_to_its_volume(one: Compose) -> None:
    (container,) = one.containers("server")
    for path in ("/models/x", "/opt/venv/x", "/tmp/x", "/x"):
        assert "Read-only" in docker("exec", container, "sh", "-c", f": > {path}", check=False), path
    host = inspect(container)["HostConfig"]

    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert {port["HostIp"] for port in host["PortBindings"]["50051/tcp"]} == {"127.0.0.1"}


async def test_a_server_that_is_stopped_and_started_under_load_loses_nothing(
    one: Compose, report: Callable[[str, Account, str], None]
) -> None:
    async with load(one.address, one.credentials) as running:
        await asyncio.sleep(2)
        await asyncio.to_thread(one.run, "stop", "server")
        stopped = inspect((await asyncio.to_thread(all_containers, one))[0])["State"]
        await asyncio.to_thread(one.run, "start", "server")
        await asyncio.sleep(2)
        account = await running.end()

    report("one server stopped and started", account, "all came back")
    assert account.is_clean, account
    assert stopped["ExitCode"] == 0


def all_containers(project: Compose) -> list[str]:
    return project.run("ps", "--all", "--quiet", "server").split()


async def test_a_server_that_crashes_under_load_comes_back_with_its_sessions(
    one: Compose, report: Callable[[str, Account, str], None]
) -> None:
    (container,) = one.containers("server")
    async with load(one.address, one.credentials) as running:
        await asyncio.sleep(2)
        await asyncio.to_thread(crash_server, container)
        await asyncio.sleep(4)
        account = await running.end()

    report("one server killed, and restarted by its policy", account, "all came back")
    assert account.is_clean, account
    assert inspect(container)["RestartCount"] == 1


def test_sessions_outlive_the_container(one: Compose) -> None:
    inputs = np.random.default_rng(3).integers(0, 2, (41, 9)).astype(np.float32)
    with Client(one.address, **one.credentials) as client:
        session = client.session(MODEL)
        first = session.run(inputs[:20])
        one.run("up", "--detach", "--wait", "--force-recreate")
        second = client.attach(session.session_id).run(inputs[20:])
        with client.session(MODEL) as undisturbed:
            expected = undisturbed.run(inputs)

    np.testing.assert_array_equal(np.concatenate([first, second]), expected)


def test_health_turns_with_the_server(one: Compose) -> None:
    (container,) = one.containers("server")
    docker("exec", container, "python", "-m", "server.rpc.health")
    docker("pause", container)
    try:
        wait_until(lambda: health(container) == "unhealthy", "a server that hangs is unhealthy")
    finally:
        docker("unpause", container)
    wait_until(lambda: health(container) == "healthy", "it is healthy again")
