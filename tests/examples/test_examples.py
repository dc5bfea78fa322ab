"""The examples and docs/bring-your-own-model.md run as they stand, against a real server."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from server.__main__ import main as server_main
from server.model import spec
from server.runtime import provider
from server.runtime.proof import plain_loop
from tests import foreign_models, step_models
from tests.conftest import ROOT, ServerProcess

PAGE = (ROOT / "docs" / "bring-your-own-model.md").read_text()
CPU = provider.choose("cpu", 0)


def example(name: str) -> ModuleType:
    loader = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert loader is not None
    module = importlib.util.module_from_spec(loader)
    assert loader.loader is not None
    loader.loader.exec_module(module)
    return module


def describe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["server", "describe", *arguments])
    return server_main()


@pytest.mark.filterwarnings("ignore:.*one after another:UserWarning")
def test_the_page_on_bringing_a_model_is_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_server: Callable[..., ServerProcess]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    *exports, call = blocks
    assert all(len(block.strip().splitlines()) < 20 for block in blocks)
    for block in exports:
        exec(compile(block, "docs/bring-your-own-model.md", "exec"), {})
    step, _ = step_models.read_back(foreign_models.fixed_to_one())
    del step.metadata_props[:]
    (tmp_path / "step.onnx").write_bytes(step.SerializeToString())
    assert "python -m server describe step.onnx" in PAGE
    assert describe(monkeypatch, "step.onnx", "--publish", "models/elsewhere/1") == 0

    server = start_server(tmp_path / "models")

    exec(compile(call.replace("127.0.0.1:50051", server.address), "call", "exec"), {})
    loaded = {entry["model"] for entry in server.log if entry["event"] == "model loaded"}
    assert loaded == {"lstm/1", "gru/1", "filter/1", "alone/1", "elsewhere/1"}


def test_every_flag_that_the_page_shows_is_one_of_describe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        describe(monkeypatch, "--help")

    known = capsys.readouterr().out
    for shown in re.findall(r"^\| `(--.*?)` \|", PAGE, re.MULTILINE):
        assert shlex.split(shown)[0] in known


def test_64_callers_are_told_from_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_server: Callable[..., ServerProcess]
) -> None:
    pytest.importorskip("silero_vad", reason="silero-vad is not installed")
    module = example("voice_activity")
    flags = ["--name", "vad", "--axis", "input=576", "--constant", "sr=16000"]
    assert (
        describe(monkeypatch, str(module.model_file()), *flags, "--publish", str(tmp_path / "vad" / "1")) == 0
    )

    heard = module.main(start_server(tmp_path).address)

    model = spec.load(tmp_path / "vad" / "1" / "model.onnx", "vad", 1)
    sound = module.frames(module.calls())
    for caller in (0, 1, 63):
        alone = plain_loop(model, CPU, model.inputs.pack({"input": sound[caller]}))
        np.testing.assert_array_equal(heard[caller], alone["output"][:, 0])
    assert heard[::2].mean() > heard[1::2].mean()


def test_a_policy_is_reset_with_each_environment(
    tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    module = example("recurrent_policy")
    module.export(tmp_path / "policy" / "1")

    observations, resets, actions = module.main(start_server(tmp_path).address)

    model = spec.load(tmp_path / "policy" / "1" / "model.onnx", "policy", 1)
    assert resets.sum() > 2 * module.NUM_ENVIRONMENTS
    for environment in (0, 7):
        begins = [*np.flatnonzero(resets[:, environment]), module.NUM_STEPS]
        for start, stop in pairwise(begins):
            episode = plain_loop(
                model, CPU, model.inputs.pack({"obs": observations[start:stop, environment]})
            )
            np.testing.assert_array_equal(actions[start:stop, environment], episode["actions"])


def test_two_stages_are_served_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_server: Callable[..., ServerProcess]
) -> None:
    monkeypatch.chdir(ROOT)
    module = example("two_stages")
    module.publish(tmp_path / "two-stages" / "1")

    totals = module.main(start_server(tmp_path).address)

    mean, times = np.zeros(4, np.float32), np.zeros(4, np.int64)
    for inputs, total in zip(
        np.random.default_rng(0).uniform(0, 1, (100, 4)).astype(np.float32), totals, strict=True
    ):
        mean = mean * np.float32(0.75) + inputs * np.float32(0.25)
        times += mean > 0.5
        np.testing.assert_array_equal(total, times)
