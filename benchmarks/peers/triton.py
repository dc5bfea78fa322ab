"""Triton: NVIDIA Triton Inference Server as a peer, on the CPU, serving the same exported step.

Its Python backend holds each sequence's state (`triton_model.py`) and its sequence batcher forms the batches.
The server comes with the package nvidia-pytriton, which wants an older numpy: it goes into the environment that `make`
makes for Triton's client, by `python -m benchmarks.peers.triton install`. What sends the messages is another module's
business.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import psutil

from server.model.spec import initial_value, load

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv" / "triton"
MODEL = ROOT / "models" / "copy" / "1" / "model.onnx"
PROGRAMS = tuple(sorted((ROOT / "clients" / "triton").glob("*.py")))
"""Sequences by Triton's client, for any server that has the model."""

UNARY_METHOD = "/inference.GRPCInferenceService/ModelInfer"
STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"

_MODEL_NAME = "copy"
_REQUIREMENTS = ("nvidia-pytriton==0.7.0", f"onnxruntime=={ort.__version__}", "numpy")
_STAMP = ENVIRONMENT / ".installed"
_PACKAGES = ENVIRONMENT / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
_TRITON = _PACKAGES / "pytriton" / "tritonserver"
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 15.0

_pb = grpc.protos("benchmarks/peers/kserve.proto")

# Tried with 64 sequences streaming, each waiting for its answer, on two shared cores that the client used too, in
# turn: processor time of Triton's processes for a message, and messages/s, medians of 3 to 7 runs. The machine
# was busy, and single runs strayed by half.
# - `oldest` without control inputs, where the model asks the request for its id and flags: 203-266 µs, 3300/s.
# - With START, END, READY and CORRID, each one more tensor to pass to the backend: 330 µs, 2300/s; read by the
#   model too, 355 µs, 2100/s.
# - `direct`: 245 µs, 2500/s without control inputs, 317 µs, 2500/s with them. It fills a batch up with requests that
#   nobody made, and the backend handles each of them. With minimum_slot_utilization 1 no different.
# - preferred_batch_size of all sequences with a max_queue_delay of 1 or 5 ms: batches grow, 20 to 35 rows, but
#   messages/s do not (3900 against 4100 at 64 sequences, 3500 against 3400 at 32), and a sequence alone would wait.
_CONFIG = """
backend: "python"
max_batch_size: {max_batch_size}
input [ {{ name: "input" data_type: TYPE_FP32 dims: [ {input_size} ] }} ]
output [ {{ name: "output" data_type: TYPE_FP32 dims: [ {output_size} ] }} ]
sequence_batching {{
  max_sequence_idle_microseconds: 3600000000
  oldest {{ max_candidate_sequences: {num_sequences} }}
}}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""


class TritonUnavailableError(RuntimeError):
    """Triton cannot be had here, or does not start; the message says why in one line."""


def is_installed() -> bool:
    """Whether `install` has succeeded with the versions wanted now."""
    return _STAMP.exists() and _STAMP.read_text(encoding="utf-8") == _stamp()


def install() -> None:
    """Make the environment and serve once from it.

    Raises:
        TritonUnavailableError: it cannot be had: no connection, or no build for this machine.
    """
    if is_installed():
        return
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise TritonUnavailableError(f"there is no Triton for {sys.platform} on {platform.machine()}")
    _call(sys.executable, "-m", "venv", str(ENVIRONMENT))
    _call(
        str(ENVIRONMENT / "bin" / "python"),
        *("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"),
        *_REQUIREMENTS,
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = _TRITON / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonUnavailableError(f"{_REQUIREMENTS[0]} has no Python backend for Python {version}")
    shutil.copy(stub, _TRITON / "backends" / "python")
    with serving(num_sequences=1):
        pass
    _STAMP.write_text(_stamp(), encoding="utf-8")


@contextmanager
def serving(
    num_sequences: int, model: Path = MODEL, max_batch_size: int = 64
) -> Iterator[tuple[str, list[int]]]:
    """Run Triton for so many sequences at once; gives its address and the ids of its processes.

    The model has the name "copy" and, as on this project's server, batches of up to 64.

    A sequence beyond that number waits until another ends: use the same ids again, or end them. A sequence may
    begin by one method and go on by the other.

    Raises:
        TritonUnavailableError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        repository, log = Path(folder) / "models", Path(folder) / "log"
        _write_repository(repository, model, num_sequences, max_batch_size)
        port = _free_port()
        with log.open("wb") as log_file:
            process = subprocess.Popen(  # noqa: S603  # nosec B603  # a command of our own
                _command(repository, port, num_sequences),
                env=_variables(),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )
        backend: list[psutil.Process] = []
        try:
            address = f"127.0.0.1:{port}"
            _wait_until_ready(process, address, log)
            backend = psutil.Process(process.pid).children(recursive=True)
            yield address, [process.pid, *(child.pid for child in backend)]
        finally:
            process.terminate()
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in backend:
                if child.is_running():
                    child.kill()


def run(program: Path, address: str) -> dict[str, list[list[float]]]:
    """Run one of `PROGRAMS`; returns what each sequence gave.

    Raises:
        RuntimeError: it failed; what it said is in the message.
    """
    ended = subprocess.run(  # noqa: S603  # nosec B603  # a command of our own
        [str(ENVIRONMENT / "bin" / "python"), str(program), address],
        capture_output=True,
        text=True,
        timeout=_START_LIMIT_S,
    )
    if ended.returncode != 0:
        raise RuntimeError(f"{program.name} failed on {address}: {ended.stderr}")
    given: dict[str, list[list[float]]] = json.loads(ended.stdout)
    return given


def step_message(
    sequence_id: int, inputs: npt.NDArray[np.float32], *, start: bool = False, end: bool = False
) -> bytes:
    """One step of a sequence as a serialised ModelInferRequest, for either method.

    Args:
        sequence_id: at least 1.
        inputs: [input size].
        start: begin from the model's initial state, as every sequence must.
        end: forget the sequence after this step.
    """
    request = _pb.ModelInferRequest(model_name=_MODEL_NAME)
    request.parameters["sequence_id"].int64_param = sequence_id
    if start:
        request.parameters["sequence_start"].bool_param = True
    if end:
        request.parameters["sequence_end"].bool_param = True
    request.inputs.add(name="input", datatype="FP32", shape=[1, len(inputs)])
    request.raw_input_contents.append(inputs.astype("<f4").tobytes())
    message: bytes = request.SerializeToString()
    return message


def outputs(answer: bytes) -> npt.NDArray[np.float32]:
    """The outputs [output size] in an answer to the unary method."""
    return _outputs(_pb.ModelInferResponse.FromString(answer).raw_output_contents)


def stream_outputs(answer: bytes) -> npt.NDArray[np.float32]:
    """The outputs [output size] in one answer of the stream; raises RuntimeError for an error sent in band."""
    response = _pb.ModelStreamInferResponse.FromString(answer)
    if response.error_message:
        raise RuntimeError(response.error_message)
    return _outputs(response.infer_response.raw_output_contents)


def _outputs(raw: list[bytes]) -> npt.NDArray[np.float32]:
    [content] = raw
    return np.frombuffer(content, "<f4")


def _write_repository(repository: Path, model: Path, num_sequences: int, max_batch_size: int) -> None:
    version = repository / _MODEL_NAME / "1"
    version.mkdir(parents=True)
    spec = load(model, _MODEL_NAME, 1).spec
    start: dict[str, Any] = {state.input_name: initial_value(state) for state in spec.states}
    np.savez(version / "start.npz", **start)
    shutil.copy(model, version / "model.onnx")
    shutil.copy(Path(__file__).with_name("triton_model.py"), version / "model.py")
    config = _CONFIG.format(
        num_sequences=num_sequences,
        max_batch_size=max_batch_size,
        input_size=spec.inputs[0].shape[0],
        output_size=spec.outputs[0].shape[0],
    )
    (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")


def _command(repository: Path, port: int, num_sequences: int) -> list[str]:
    return [
        str(_TRITON / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={_TRITON / 'backends'}",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        # With its default of 8, fewer than are in flight, this version died by signal 11 within seconds of 32 or
        # 64 streams in 7 runs of 10; with 256 in none of 36.
        f"--grpc-infer-allocation-pool-size={max(256, 4 * num_sequences)}",
        "--exit-timeout-secs=2",
    ]


def _variables() -> dict[str, str]:
    libraries = [
        _PACKAGES / "nvidia_pytriton.libs",
        _TRITON / "external_libs",
        # The backend's stub is linked against this Python's shared library.
        Path(sysconfig.get_config_var("LIBDIR")),
    ]
    return os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(str(folder) for folder in libraries if folder.exists()),
        # The stub's interpreter takes the environment of the first python3 on the path, and ignores PYTHONPATH.
        "PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline_s = time.monotonic() + _START_LIMIT_S
    with grpc.insecure_channel(address) as channel:
        ready: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerReady"
        )
        while process.poll() is None and time.monotonic() < deadline_s:
            try:
                if _pb.ServerReadyResponse.FromString(ready(b"", timeout=1)).ready:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.05)
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    complaint = next((line for line in said if line.startswith("E") or "error" in line), "it said nothing")
    raise TritonUnavailableError(f"Triton does not start: {complaint[:300]}")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _call(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # nosec B603  # a command of our own
    if ended.returncode != 0:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TritonUnavailableError(f"Triton cannot be installed into {ENVIRONMENT}: {reason}")


def _stamp() -> str:
    return "\n".join(_REQUIREMENTS) + "\n"


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if arguments != ["install"]:
        print("usage: python -m benchmarks.peers.triton install", file=sys.stderr)
        return 2
    try:
        install()
    except TritonUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
