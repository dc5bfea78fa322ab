"""What the containers say when something is wrong, in a line that says what to do; and that health tells the truth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ntm import Client, ResourceExhaustedError
from tests.compose.compose import Compose, docker, health, wait_until
from tests.conftest import ROOT
from tests.valkey import free_port

pytestmark = [pytest.mark.compose, pytest.mark.timeout(180)]

MODELS = f"{ROOT}/models:/models:ro"


_INSECURE = ("--env", "NTM_SERVER_INSECURE=true")
"""The image alone listens beyond its container, and has no certificate."""


def failed_start(*options: str, flags: tuple[str, ...] = ()) -> str:
    """The one line that a server ends with that cannot start."""
    said = docker("run", "--rm", "--read-only", *_INSECURE, *options, "ntm-server", *flags, check=False)
    # The transport has a line of its own for a port that is taken.
    lines = [line for line in said.splitlines() if not line.startswith(("{", "gRPC server could not bind"))]
    assert "Traceback" not in said
    assert len(lines) == 1, said
    return lines[0]


@pytest.fixture
def containers() -> Iterator[Callable[..., str]]:
    """Start containers, and remove them after the test."""
    started: list[str] = []

    def start(*args: str) -> str:
        started.append(docker("run", "--detach", *_INSECURE, *args).strip().splitlines()[-1])
        return started[-1]

    yield start
    for container in started:
        docker("rm", "--force", "--volumes", container)


def logged(container: str, event: str) -> list[dict[str, object]]:
    lines = [line for line in docker("logs", container).splitlines() if line.startswith("{")]
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def test_no_models_directory() -> None:
    said = failed_start("--env", "NTM_SERVER_MODELS=/nowhere")

    assert "no models directory /nowhere" in said
    assert "NAME/VERSION/model.onnx" in said


def test_an_empty_models_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    said = failed_start("--volume", f"{tmp_path}:/models:ro")

    assert "holds no model" in said
    assert "python -m export" in said


def test_a_models_directory_that_the_servers_user_may_not_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    said = failed_start("--volume", f"{tmp_path}:/models:ro")

    assert "cannot be read by the server's user (uid 10001)" in said
    assert "chmod" in said


def test_a_corrupt_model(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "copy" / "1").mkdir(parents=True)
    (tmp_path / "copy" / "1" / "model.onnx").write_bytes(b"not a model")
    said = docker("run", "--rm", *_INSECURE, "--volume", f"{tmp_path}:/models:ro", "ntm-server", check=False)

    assert "/models/copy/1/model.onnx" in said
    assert "Traceback" not in said


def test_a_store_url_that_is_wrong_or_empty() -> None:
    for url in ("postgres://somewhere", "", "redis://", "sqlite:///"):
        said = failed_start("--env", f"NTM_SERVER_STORE={url}")

        assert "sqlite:///" in said or "redis://" in said, url


def test_a_setting_that_does_not_exist() -> None:
    assert "NTM_SERVER_STROE" in failed_start("--env", "NTM_SERVER_STROE=none")


def test_a_port_that_is_taken_in_the_container(containers: Callable[..., str]) -> None:
    first = containers("ntm-server", "--store", "none")
    wait_until(lambda: bool(logged(first, "listening")), "the first server listens")

    said = failed_start("--network", f"container:{first}", flags=("--store", "none"))

    assert "cannot listen on 0.0.0.0:50051" in said


def test_a_port_that_is_taken_on_the_machine(
    start_project: Callable[..., Compose], containers: Callable[..., str]
) -> None:
    port = free_port()
    containers("--publish", f"127.0.0.1:{port}:50051", "ntm-server", "--store", "none")
    project = start_project("port", NTM_PORT=str(port))

    assert "port is already allocated" in project.run("up", "--detach", "--wait", check=False)


def test_a_read_only_volume_for_the_store() -> None:
    said = failed_start("--tmpfs", "/data:ro")

    assert "cannot write to /data (Read-only file system)" in said
    assert "--store" in said


def test_a_full_volume_refuses_steps_says_so_and_keeps_what_it_has(containers: Callable[..., str]) -> None:
    port = free_port()
    options = ("--tmpfs", "/data:size=1m,uid=10001", "--publish", f"127.0.0.1:{port}:50051")
    container = containers(*options, "ntm-server")
    wait_until(lambda: health(container) == "healthy", "the server is healthy")
    with Client(f"127.0.0.1:{port}") as client:
        sessions = [client.session("copy")]

        def fill() -> None:
            while True:
                sessions.append(client.session("copy"))

        with pytest.raises(ResourceExhaustedError, match="store is full, and nothing was changed"):
            fill()
        assert client.attach(sessions[0].session_id).next_step == 0


def test_a_store_that_is_not_there_yet_is_waited_for(
    containers: Callable[..., str], start_project: Callable[..., Compose], secrets: Path
) -> None:
    project = start_project("late")
    project.run("--profile", "scale", "up", "--detach", "--no-deps", "--scale", "replica=1", "replica")
    (replica,) = project.containers("replica")
    waiting = "waiting for the session store: start it, or give another --store"
    wait_until(lambda: bool(logged(replica, waiting)), "it says what it waits for")
    time.sleep(2)
    assert health(replica) != "healthy"
    assert (secrets / "valkey_password").read_text() not in docker("logs", replica)
    assert docker("exec", replica, "python", "-m", "server.rpc.health", check=False).startswith(
        "127.0.0.1:50050: UNAV"
    )

    project.run("--profile", "scale", "up", "--detach", "--no-deps", "valkey")

    wait_until(lambda: health(replica) == "healthy", "it is healthy when the store is there")


def test_a_secret_that_is_missing(start_project: Callable[..., Compose], tmp_path: Path) -> None:
    project = start_project("secret", NTM_SECRETS=str(tmp_path / "none"))

    said = project.run("--profile", "scale", "up", "--detach", "--no-deps", "valkey", check=False)

    assert "valkey_password" in said


def test_cuda_in_an_image_without_it() -> None:
    said = failed_start("--env", "NTM_SERVER_DEVICE=cuda")

    assert "CUDA" in said


def test_the_gpu_override_on_a_machine_without_a_gpu(start_project: Callable[..., Compose]) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    docker("tag", "ntm-server", "ntm-server:gpu")  # what is tried is the engine's refusal, not the image
    try:
        said = start_project("gpu").run(
            "up", "--detach", "--no-build", check=False, files=("docker-compose.gpu.yml",)
        )
    finally:
        docker("rmi", "ntm-server:gpu")

    assert 'could not select device driver "nvidia"' in said
