"""The whole path: train, export, serve, call; and the server gives what torch gives."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from export.__main__ import main as export
from ntm import Client
from tests import step_models
from tests.conftest import ServerProcess
from tests.export.conftest import write_run
from training.__main__ import main as train
from training.checkpoint import BEST, load, restore_cell
from training.model import named_tensors, unroll

NTM = ["--model.memory-rows=12", "--model.row-width=5", "--model.num-read-heads=2"]
DNC = ["--model.architecture=dnc", "--model.memory-rows=12", "--model.row-width=5"]
PLAIN_DNC = ["--no-model.masked-lookup", "--no-model.deallocation", "--no-model.sharp-links"]
PLAIN = ["--model.architecture=plain", "--model.controller-layers=2"]


@pytest.mark.parametrize(
    ("task", "machine"),
    [
        ("copy", [*NTM, "--model.controller=lstm"]),
        ("repeat-copy", [*NTM, "--model.controller=feedforward"]),
        ("associative-recall", [*NTM, "--model.controller=gru"]),
        ("priority-sort", [*NTM, "--model.controller=mgu", "--model.num-write-heads=2"]),
        ("copy", [*DNC, "--model.num-read-heads=2"]),
        ("associative-recall", [*DNC, *PLAIN_DNC, "--model.controller=feedforward"]),
        ("dynamic-ngrams", [*PLAIN, "--model.controller=lstm"]),
        ("copy", [*PLAIN, "--model.controller=gru"]),
        ("copy", [*PLAIN, "--model.controller=mgu"]),
    ],
)
def test_a_model_trained_exported_and_served_gives_what_torch_gives(
    tmp_path: Path, start_server: Callable[..., ServerProcess], task: str, machine: list[str]
) -> None:
    run_dir, models = tmp_path / "run", tmp_path / "models"
    settings = [*machine, "--model.controller-size=9", "--model.controller-scale=1"]

    assert (
        train(
            [
                task,
                f"--run-dir={run_dir}",
                "--seed=1",
                "--num-updates=3",
                "--evaluation.long-sizes=[]",
                *settings,
            ]
        )
        == 0
    )
    assert export([str(run_dir), str(models / "trained" / "1")]) == 0
    cell, _ = restore_cell(load(run_dir / BEST))
    inputs = np.random.default_rng(0).integers(0, 2, (40, cell.input_size)).astype(np.float32)

    with Client(start_server(models).address) as client, client.session("trained") as session:
        outputs = session.run(inputs)
        state = session.state()
        spec = client.model("trained").spec

    api_axes = {s.input_name: s.api_axes or range(len(s.shape)) for s in spec.states}
    with torch.no_grad():
        expected, final = unroll(cell, torch.from_numpy(inputs)[:, None])
    np.testing.assert_allclose(outputs, torch.sigmoid(expected[:, 0]), atol=1e-5)
    for name, tensor in named_tensors(final).items():
        expected_state = tensor[0].numpy().transpose(api_axes[name])
        np.testing.assert_allclose(state[name], expected_state, atol=1e-4, err_msg=name)
    if "memory" in state:
        assert state["memory"].shape == (12, 5)
    assert spec.task == task
    assert [s.input_name for s in spec.states] == list(named_tensors(final))
    assert spec.provenance.seed == 1


def test_a_version_exported_while_the_server_runs_is_served(
    tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    models = tmp_path / "models"
    step_models.write(models, step_models.accumulator(), "other")
    server = start_server(models, "--model-poll-s", "0.02")

    assert export([str(write_run(tmp_path / "run")), str(models / "small" / "1")]) == 0
    while server.wait_for("model loaded")["model"] != "small/1":
        pass

    assert [entry for entry in server.log if entry["level"] == "error"] == []
    with Client(server.address) as client, client.session("small") as session:
        assert session.run(np.zeros((2, 4))).shape == (2, 3)


def test_a_dnc_goes_on_where_it_was_after_the_server_is_killed(
    tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    run = write_run(tmp_path / "run", "--model.architecture=dnc", "--model.num-read-heads=2")
    models, store = tmp_path / "models", f"sqlite:///{tmp_path}/sessions.sqlite3"
    assert export([str(run), str(models / "dnc" / "1")]) == 0
    cell, _ = restore_cell(load(run / BEST))
    inputs = np.random.default_rng(0).integers(0, 2, (24, cell.input_size)).astype(np.float32)

    first = start_server(models, store=store)
    with Client(first.address) as client:
        session = client.session("dnc")
        before = session.run(inputs[:15])
        first.signal(signal.SIGKILL)
    with Client(start_server(models, store=store).address) as client:
        session = client.attach(session.session_id)
        after, state = session.run(inputs[15:]), session.state()

    with torch.no_grad():
        expected, final = unroll(cell, torch.from_numpy(inputs)[:, None])
    np.testing.assert_allclose(np.concatenate([before, after]), torch.sigmoid(expected[:, 0]), atol=1e-5)
    np.testing.assert_allclose(state["links"], final.links[0], atol=1e-4)
    np.testing.assert_allclose(state["usage"], final.usage[0], atol=1e-4)
