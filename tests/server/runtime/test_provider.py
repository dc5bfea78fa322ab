"""The device: what was asked for is what is used, or it is said."""

from __future__ import annotations

import ctypes
from importlib import metadata

import onnxruntime
import pytest
import structlog.testing

from server.errors import DeviceError
from server.runtime import provider as device

BOTH_PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]
HAS_CUDA_BUILD = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.skipif(HAS_CUDA_BUILD, reason="this build of ONNX Runtime has CUDA")
def test_cuda_without_cuda_is_refused_and_names_what_is_missing() -> None:
    with pytest.raises(DeviceError, match=r"--device cuda cannot be had.*CUDAExecutionProvider.*extra `gpu`"):
        device.choose("cuda", 0)


@pytest.mark.skipif(HAS_CUDA_BUILD, reason="this build of ONNX Runtime has CUDA")
def test_auto_falls_back_to_the_cpu_and_says_so() -> None:
    with structlog.testing.capture_logs() as log:
        chosen = device.choose("auto", 0)

    assert (chosen.provider, chosen.fell_back) == ("CPUExecutionProvider", True)
    assert [entry["event"] for entry in log] == ["device auto fell back to the CPU"]
    assert "CUDAExecutionProvider" in log[0]["reason"]


def test_a_provider_that_does_not_load_is_no_silent_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu does without CUDA libraries: it lists CUDA, takes the CPU, and raises nothing."""
    real_session = onnxruntime.InferenceSession

    def on_the_cpu(model: bytes, options: object, **others: object) -> onnxruntime.InferenceSession:
        return real_session(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: BOTH_PROVIDERS)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)

    with pytest.raises(DeviceError, match="asked for CUDAExecutionProvider and took CPUExecutionProvider"):
        device.choose("cuda", 0)


def test_a_machine_without_nvidias_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest case of the image for GPUs: on a machine, or in a container, that was given none."""

    def not_found(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: BOTH_PROVIDERS)
    monkeypatch.setattr(ctypes, "CDLL", not_found)

    with pytest.raises(
        DeviceError, match=r"libcuda\.so\.1, of NVIDIA's driver, does not load: install the driver"
    ):
        device.choose("cuda", 0)


def test_two_builds_of_onnx_runtime_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")

    with pytest.raises(DeviceError, match="both installed"):
        device.choose("cpu", 0)


def test_cuda_gets_the_device_the_limit_and_an_arena_that_grows_by_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    class Session:
        def __init__(
            self,
            model: bytes,
            options: object,
            providers: list[tuple[str, dict[str, object]]],
            **others: object,
        ) -> None:
            given.extend(providers)

        def get_providers(self) -> list[str]:
            return [given[-1][0]]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: BOTH_PROVIDERS)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)

    chosen = device.choose("cuda", 1, memory_limit_mib=512)
    chosen.session(b"")

    options = {"device_id": 1, "arena_extend_strategy": "kSameAsRequested", "gpu_mem_limit": 512 * 2**20}
    assert (chosen.kind, chosen.fell_back) == ("cuda", False)
    assert given == [("CUDAExecutionProvider", options)] * 2
