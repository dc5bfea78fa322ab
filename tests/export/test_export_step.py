"""Any module of one step is exported: whatever it takes and gives, under any names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from export import export_step
from export.errors import StepError, TargetError, VerificationError
from export.onnx_file import read_spec
from export.publish import MODEL_FILE
from ntm.v1 import model_pb2
from server.model.spec import load as load_spec
from server.runtime import provider
from server.runtime.probe import load_runner
from server.runtime.proof import prove
from training.model import NTM, named_tensors


class TwoLayers(nn.Module):
    """Two inputs, two outputs, states with the batch in the middle, and an input of the whole session."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, num_layers=2)
        self.act = nn.Linear(4, 3)

    def forward(self, inputs, state):
        given = torch.cat([inputs["obs"], inputs["goal"], state["speaker"]], dim=-1)
        hidden, (h, c) = self.lstm(given.unsqueeze(0), (state["h"], state["c"]))
        outputs = {"action": torch.tanh(self.act(hidden[0])), "is_sure": hidden[0, :, :1] > 0}
        return outputs, {"h": h, "c": c}


TWO_LAYERS = {
    "inputs": {"obs": torch.zeros(1, 2), "goal": torch.zeros(1, 2)},
    "state": {"h": torch.zeros(2, 1, 4), "c": torch.ones(2, 1, 4), "speaker": torch.full((1, 1), 0.5)},
    "batch_axes": {"h": 1, "c": 1},
    "session_inputs": ["speaker"],
}


class Echo(nn.Module):
    """Symbols through an embedding, a machine and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.ntm = NTM(5, 6, memory_rows=8, row_width=4, controller_size=6, initial_memory="learned")

    def forward(self, symbol, state):
        logits, state = self.ntm.step(self.embedding(symbol), state)
        return torch.softmax(logits, dim=-1), state


class Running(NamedTuple):
    total: Tensor
    count: Tensor


class Mean(nn.Module):
    """The mean so far, of a state with fields."""

    def forward(self, inputs, state):
        after = Running(state.total + inputs, state.count + 1)
        return after.total / after.count, after


def exported(folder: Path, name: str) -> tuple[ort.InferenceSession, model_pb2.ModelSpec]:
    path = folder / name / "1" / MODEL_FILE
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]), read_spec(onnx.load(path))


def test_a_module_with_several_inputs_outputs_and_states_keeps_its_names_axes_and_types(tmp_path):
    torch.manual_seed(0)
    module = TwoLayers()

    report = export_step(
        module, **TWO_LAYERS, path=tmp_path / "two" / "1", descriptions={"obs": "where it is"}
    )

    session, spec = exported(tmp_path, "two")
    assert [(tensor.name, list(tensor.shape), tensor.description) for tensor in spec.inputs] == [
        ("obs", [2], "where it is"),
        ("goal", [2], ""),
    ]
    assert [(tensor.name, list(tensor.shape)) for tensor in spec.outputs] == [
        ("action", [3]),
        ("is_sure", [1]),
    ]
    assert [(state.input_name, state.output_name, state.batch_axis, state.fill) for state in spec.states] == [
        ("h", "next_h", 1, 0),
        ("c", "next_c", 1, 1),
        ("speaker", "", 0, 0.5),
    ]
    assert all(state.role == model_pb2.STATE_ROLE_OTHER for state in spec.states)
    assert report.num_steps == 50
    obs, goal, speaker = (torch.randn(3, size) for size in (2, 2, 1))
    h, c = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    outputs, after = module.eval()({"obs": obs, "goal": goal}, {"h": h, "c": c, "speaker": speaker})
    given = {"obs": obs, "goal": goal, "h": h, "c": c, "speaker": speaker}
    action, is_sure, next_h, next_c = session.run(
        ["action", "is_sure", "next_h", "next_c"], {name: tensor.numpy() for name, tensor in given.items()}
    )
    np.testing.assert_allclose(action, outputs["action"].detach(), atol=1e-5)
    np.testing.assert_array_equal(is_sure, outputs["is_sure"])
    np.testing.assert_allclose(next_h, after["h"].detach(), atol=1e-5)
    np.testing.assert_allclose(next_c, after["c"].detach(), atol=1e-5)


def test_a_network_with_a_machine_in_it_shows_the_machines_memory_as_the_paper_does(tmp_path):
    torch.manual_seed(0)
    module = Echo()
    is_training = module.training

    export_step(
        module,
        inputs=torch.zeros(1, dtype=torch.long),
        state=module.ntm.initial_state(1),
        path=tmp_path / "echo" / "1",
        sequences={"input": torch.randint(7, (12, 128))},
    )

    session, spec = exported(tmp_path, "echo")
    roles = {state.input_name: (state.role, list(state.api_axes)) for state in spec.states}
    assert roles["memory"] == (model_pb2.STATE_ROLE_MEMORY, [1, 0])
    assert roles["controller_cell"] == (model_pb2.STATE_ROLE_CONTROLLER, [])
    assert spec.inputs[0].shape == []
    # Its heads and its write are those that ONNX Runtime runs best.
    assert "BatchNormalization" in {
        node.op_type for node in onnx.load(tmp_path / "echo" / "1" / MODEL_FILE).graph.node
    }
    assert module.training == is_training
    symbols = torch.tensor([3, 1])
    outputs, _ = module(symbols, module.ntm.initial_state(2))
    state = {
        name: tensor.detach().numpy() for name, tensor in named_tensors(module.ntm.initial_state(2)).items()
    }
    [said] = session.run(["output"], {"input": symbols.numpy(), **state})
    np.testing.assert_allclose(said, outputs.detach(), atol=1e-5)


def test_a_state_with_fields_has_their_names_and_an_output_alone_has_one(tmp_path):
    export_step(
        Mean(),
        inputs=torch.zeros(1, 3),
        state=Running(torch.zeros(1, 3), torch.zeros(1, 1)),
        path=tmp_path / "mean" / "1",
    )

    session, spec = exported(tmp_path, "mean")
    assert [state.input_name for state in spec.states] == ["total", "count"]
    total, count = np.ones((2, 3), np.float32), np.ones((2, 1), np.float32)
    [mean] = session.run(["output"], {"input": 3 * total, "total": total, "count": count})
    np.testing.assert_array_equal(mean, np.full((2, 3), 2))


class Broken(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, inputs, state):
        return self.step(inputs, state)


X, H = torch.zeros(1, 2), torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("step", "settings", "said"),
    [
        (
            lambda x, h: (x, h),
            {"inputs": torch.zeros(3, 2)},
            r"input is \[3, 2\]: give it with a batch of 1 on axis 0",
        ),
        (lambda x, h: (x, h), {"state": {}}, "without a state needs no session"),
        (lambda x, h: x + h, {}, r"gives \(outputs, next state\), not Tensor"),
        (
            lambda x, h: (x, h[:, :1]),
            {},
            r"state goes in as torch.float32 \[1, 2\] and comes back as .*\[1, 1\]",
        ),
        (lambda x, h: (x, {"other": h}), {}, "gives back the states other and takes state"),
        (lambda x, h: ({"next_state": x}, h), {}, "next_state has the name of another tensor"),
        (lambda x, h: (x, h), {"batch_axes": {"hidden": 1}}, "there is no hidden: there are input, state"),
        (lambda x, h: ("text", h), {}, "not str"),
        (lambda x, h: (x if float(x.sum()) > 0 else -x, h), {}, "torch's exporter can make no graph"),
    ],
)
def test_a_module_that_is_no_step_is_refused_with_what_is_wrong_about_it(tmp_path, step, settings, said):
    with pytest.raises(StepError, match=said):
        export_step(Broken(step), **({"inputs": X, "state": H} | settings), path=tmp_path / "broken" / "1")

    assert not (tmp_path / "broken").exists()


class Squeezed(nn.Module):
    """The batch of 1 is written into it in more places than one."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 6), nn.Linear(6, 3)

    def forward(self, inputs, state):
        out, state = self.gru(inputs.view(1, 1, 4), state)
        return {"scores": self.head(out.view(1, 6)), "largest": self.head(out.view(6)).max()}, state


def test_a_module_that_takes_a_batch_of_1_only_is_exported_for_that_and_served_in_batches(tmp_path):
    torch.manual_seed(0)
    module = Squeezed()

    with pytest.warns(UserWarning, match="one after another: the module fails at a batch of 2"):
        report = export_step(
            module,
            inputs=torch.zeros(1, 4),
            state=torch.zeros(1, 1, 6),
            batch_axes={"state": 1},
            path=tmp_path / "squeezed" / "1",
        )

    assert "fails at a batch of 2" in report.hard_wired
    assert report.num_steps == 50
    assert list(report.differences) == [1]
    model = load_spec(tmp_path / "squeezed" / "1" / MODEL_FILE, "squeezed", 1)
    assert {t.name: (list(t.shape), t.batch_axis) for t in model.spec.outputs} == {
        "scores": ([3], 0),
        "largest": ([], -1),
    }
    runner = load_runner(model, provider.choose("cpu", 0), num_slots=8, max_batch_size=8)
    assert runner.row_by_row
    assert prove(runner).largest_difference == 0


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda x, h: (x.sum(), h + x), "exactly one axis must have the batch's length"),
        (lambda x, h: (x, (h + x)[:1]), r"comes back as torch.float32 \[1, 2\]"),
        (lambda x, h: (torch.stack([row + 1 for row in x]), h + x), "torch's exporter can make no graph"),
    ],
)
def test_why_a_module_takes_a_batch_of_1_only_is_told(tmp_path, step, said):
    with pytest.warns(UserWarning, match=said):
        report = export_step(Broken(step), inputs=X, state=H, path=tmp_path / "alone" / "1")

    assert report.hard_wired


def test_a_version_is_never_overwritten_and_a_path_that_is_none_is_refused(tmp_path):
    (tmp_path / "mean" / "1").mkdir(parents=True)
    for path in (tmp_path / "mean" / "1", tmp_path / "mean" / "one"):
        with pytest.raises(TargetError):
            export_step(Broken(lambda x, h: (x, h)), inputs=X, state=H, path=path)


def test_what_onnx_runtime_computes_otherwise_than_torch_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr("export.verification.LARGEST_DIFFERENCE", -1.0)
    monkeypatch.setattr("export.verification._TIMES_TORCH", -1)

    with pytest.raises(VerificationError, match="differ between ONNX Runtime and torch"):
        export_step(
            Broken(lambda x, h: (x.sin() + h, h + x)), inputs=X, state=H, path=tmp_path / "sine" / "1"
        )

    assert not (tmp_path / "sine").exists()
