"""Device: where models run, decided once and never changed in silence.

ONNX Runtime drops an execution provider that cannot load and carries on with the CPU. So what was asked for
is compared with what a session really has, and a difference is an error or is said aloud.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from platform import machine
from typing import Any, Literal

import onnxruntime as ort
import structlog
from onnx import TensorProto, helper

from server.errors import DeviceError

log = structlog.get_logger()

RequestedDevice = Literal["cpu", "cuda", "auto"]

_CUDA_PROVIDER = "CUDAExecutionProvider"
_CPU_PROVIDER = "CPUExecutionProvider"
_DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class Device:
    """An execution device; `kind` is ONNX Runtime's name for it, and the only thing code may differ by."""

    requested: RequestedDevice
    kind: Literal["cpu", "cuda"]
    device_id: int
    fell_back: bool
    memory_limit_mib: int | None = None
    """What ONNX Runtime's arena for one graph may grow to, on CUDA."""

    @property
    def provider(self) -> str:
        """The execution provider, by ONNX Runtime's name."""
        return _CUDA_PROVIDER if self.kind == "cuda" else _CPU_PROVIDER

    @cached_property
    def processor(self) -> str:
        """What it is made of: elsewhere the same graph may round differently."""
        return _cpu() if self.kind == "cpu" else _gpu(self.device_id)

    def session(self, model: bytes, folds_constants: bool = True) -> ort.InferenceSession:
        """A session for one graph on this device.

        Args:
            model: the graph, serialised.
            folds_constants: whether ONNX Runtime computes what is constant beforehand.

        Raises:
            DeviceError: ONNX Runtime put it on another provider.
        """
        options = ort.SessionOptions()
        # A step is a few hundred microseconds of small operations: a second thread costs more than it brings,
        # and spinning would burn a core between steps.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # What fails also raises, and whoever catches it logs it: a trial run may fail.
        options.log_severity_level = 4
        session = ort.InferenceSession(
            model,
            options,
            providers=[(self.provider, self._provider_options())],
            disabled_optimizers=[] if folds_constants else ["ConstantFolding"],
        )
        active = session.get_providers()
        if active[0] != self.provider:
            raise DeviceError(
                f"ONNX Runtime {ort.__version__} was asked for {self.provider} and took {active[0]}: "
                "its CUDA or cuDNN libraries did not load; install the extra `gpu`, or use --device cpu"
            )
        return session

    def _provider_options(self) -> dict[str, Any]:
        if self.kind == "cpu":
            return {}
        # Every run of a size asks for the same memory: an arena that doubled would hold what nobody uses.
        options: dict[str, Any] = {"device_id": self.device_id, "arena_extend_strategy": "kSameAsRequested"}
        if self.memory_limit_mib is not None:
            options["gpu_mem_limit"] = self.memory_limit_mib * 2**20
        return options


def choose(requested: RequestedDevice, device_id: int, memory_limit_mib: int | None = None) -> Device:
    """The device for a setting: `auto` takes CUDA where it works, and says so when it falls back.

    Args:
        requested: what was asked for.
        device_id: index of the CUDA device.
        memory_limit_mib: what ONNX Runtime's arena for one graph may grow to, on CUDA.

    Raises:
        DeviceError: `cuda` was asked for and cannot be had, or two builds of ONNX Runtime are installed.
    """
    _refuse_two_builds()
    if requested == "cpu":
        return Device(requested, "cpu", 0, fell_back=False)
    cuda = Device(requested, "cuda", device_id, fell_back=False, memory_limit_mib=memory_limit_mib)
    missing = _what_cuda_misses(cuda)
    if missing is None:
        return cuda
    if requested == "cuda":
        raise DeviceError(f"--device cuda cannot be had: {missing}")
    log.warning("device auto fell back to the CPU", reason=missing)
    return Device(requested, "cpu", 0, fell_back=True)


def _cpu() -> str:
    """The processor's model, and which of its vector units can be used: these choose the kernels."""
    facts = dict.fromkeys(("model name", "flags", "Features"), "")
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if facts.get(name.strip()) == "":
            facts[name.strip()] = value.strip()
    units = " ".join(sorted((facts["flags"] or facts["Features"]).split()))
    return f"{facts['model name'] or machine()} ({hashlib.sha256(units.encode()).hexdigest()[:8]})"


def _gpu(device_id: int) -> str:
    """The model of a CUDA device, as the driver names it."""
    told = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for line in told[device_id].read_text(encoding="utf-8").splitlines() if device_id < len(told) else []:
        if line.startswith("Model:"):
            return line.removeprefix("Model:").strip()
    return f"CUDA device {device_id}"


def _refuse_two_builds() -> None:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) > 1:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other: uninstall both, then "
            "install one of the extras `server` (CPU) and `gpu`"
        )


def _has_driver() -> bool:
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _what_cuda_misses(cuda: Device) -> str | None:
    """Why CUDA cannot be used, or None: a trial session tells, since being listed proves nothing."""
    available: Sequence[str] = ort.get_available_providers()
    if _CUDA_PROVIDER not in available:
        return (
            f"ONNX Runtime {ort.__version__} is built without {_CUDA_PROVIDER} (it has {', '.join(available)}); "
            "install the extra `gpu` in place of `server`"
        )
    if not _has_driver():
        return (
            f"{_DRIVER}, of NVIDIA's driver, does not load: install the driver and, for a container, NVIDIA's "
            "container toolkit (docker-compose.gpu.yml reserves a GPU), or use --device cpu"
        )
    ort.preload_dlls()
    trial = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["x"], ["y"])],
            "trial",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    try:
        cuda.session(trial.SerializeToString())
    except Exception as error:  # ONNX Runtime raises its own types and plain RuntimeError
        return str(error).strip().split("\n", 1)[0]
    return None
