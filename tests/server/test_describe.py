"""`python -m server describe`: other people's files, from nothing but the file and what nobody can read off it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import json_format

from ntm.v1 import model_pb2
from server.__main__ import main
from server.model import spec
from server.model.describe import Hints, draft
from tests import foreign_models, step_models

HINTS = {
    "several inputs, outputs and states": [
        "--input",
        "goal:session",
        "--initial",
        "tail=ones",
        "--initial",
        "count=5",
    ],
    "open axes": ["--axis", "x.1=12", "--axis", "state=5"],
    "a scalar of a session": ["--input", "limit:session", "--initial", "limit=1"],
    "frames at a time": ["--axis", "speech=3"],
}


def file_of(tmp_path: Path, content: bytes) -> Path:
    """The file as its makers would give it: without a spec."""
    step, _ = step_models.read_back(content)
    del step.metadata_props[:]
    path = tmp_path / "step.onnx"
    path.write_bytes(step.SerializeToString())
    return path


def describe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["server", "describe", *arguments])
    return main()


@pytest.mark.parametrize("kind", foreign_models.KINDS)
def test_a_file_of_each_kind_is_described_proven_and_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, _ = foreign_models.KINDS[kind]
    _, expected = step_models.read_back(make())
    hints = HINTS.get(kind, [])
    if kind == "a branch on a constant":
        hints = ["--constant", "sr=16000"]
    directory = tmp_path / "models" / "mine" / "1"

    status = describe(monkeypatch, str(file_of(tmp_path, make())), *hints, "--publish", str(directory))

    assert status == 0, capsys.readouterr()
    assert "bit for bit" in capsys.readouterr().out
    found = spec.load(directory / "model.onnx", "mine", 1).spec
    assert {s.input_name: s.output_name for s in found.states} == {
        s.input_name: s.output_name for s in expected.states
    }
    assert [tensor.name for tensor in found.inputs] == [tensor.name for tensor in expected.inputs]
    assert {tensor.name for tensor in found.outputs} >= {tensor.name for tensor in expected.outputs}


def test_the_spec_that_is_printed_is_the_one_to_put_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe(monkeypatch, str(file_of(tmp_path, step_models.delay_line()))) == 0

    printed = capsys.readouterr().out
    found = json_format.Parse(printed[printed.index("\n{") :], model_pb2.ModelSpec())
    assert {(state.input_name, state.output_name) for state in found.states} == {
        ("a", "next_a"),
        ("b", "next_b"),
    }


def test_what_nobody_can_read_off_the_file_has_to_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = describe(monkeypatch, str(file_of(tmp_path, foreign_models.open_axes())))

    assert status == 1
    told = capsys.readouterr().out
    assert "has to be told" in told
    assert "--axis x.1=LENGTH" in told


def test_an_open_axis_that_is_no_batch_axis_has_to_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = describe(monkeypatch, str(file_of(tmp_path, foreign_models.frames_at_a_time())))

    assert status == 1
    told = capsys.readouterr().out
    assert "axis 1 of 'speech' (num_frames) is open, and no batch axis" in told
    assert "--axis speech.1=LENGTH" in told
    assert "one session at a time" not in told  # that is known only when all lengths are


def test_where_all_inputs_could_be_states_the_first_is_the_steps(tmp_path: Path) -> None:
    found = draft(file_of(tmp_path, foreign_models.no_names_in_common()), Hints())

    assert [tensor.name for tensor in found.spec.inputs] == ["input_2"]
    assert [tensor.name for tensor in found.spec.outputs] == ["activation_2"]
    assert not found.missing
    assert any("'input_2' is a step's" in guess for guess in found.guessed)


def test_names_in_pairs_do_not_make_the_steps_own_input_a_state(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    step (float[4] audio_in, float[4] h_in, float limit) => (float[4] audio_out, float[4] h_out)
    { h_out = Add (audio_in, h_in)  audio_out = Mul (h_out, limit) }
    """
    path = tmp_path / "step.onnx"
    path.write_bytes(foreign_models.parse(text).SerializeToString())

    found = draft(path, Hints(inputs={"limit": "session"}))

    assert not found.missing
    assert [tensor.name for tensor in found.spec.inputs] == ["audio_in"]
    assert [tensor.name for tensor in found.spec.outputs] == ["audio_out"]


def test_a_file_without_states_is_told_to_have_none(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    step (int64 sr) => (int64 twice) { twice = Add (sr, sr) }
    """
    path = tmp_path / "step.onnx"
    path.write_bytes(foreign_models.parse(text).SerializeToString())

    assert any("no state was found" in said for said in draft(path, Hints()).missing)


def test_states_without_names_in_common_are_paired_by_their_shapes(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    step (float[N,2] args_0, float[N,3] args_1, float[N,1,3] args_2)
        => (float[N,3] linear_7, float[N,1,3] add_4, float[N,3] mul_9)
    <int64[1] one = {1}, int64[1] end = {3}, int64[1] zero = {0}>
    {
        mean = ReduceMean <axes = [1], keepdims = 1> (args_0)
        linear_7 = Add (args_1, mean)
        wide = Unsqueeze (linear_7, one)
        add_4 = Add (args_2, wide)
        mul_9 = Neg (linear_7)
    }
    """
    path = tmp_path / "step.onnx"
    path.write_bytes(foreign_models.parse(text).SerializeToString())

    found = draft(path, Hints(outputs=["mul_9"]))

    assert {s.input_name: s.output_name for s in found.spec.states} == {
        "args_1": "linear_7",
        "args_2": "add_4",
    }
    assert not found.missing
    assert any("args_2" in guess for guess in found.guessed)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--state", "h=nothing"], "the graph has no output 'nothing'"),
        (["--axis", "x=7"], "has no such open axis"),
        (["--axis", "x"], "say INPUT=LENGTH"),
        (["--initial", "sum=many"], "say zeros, ones, a number"),
        (["--constant", "sum"], "say NAME=VALUE"),
    ],
)
def test_a_hint_that_fits_nothing_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    complaint: str,
) -> None:
    assert describe(monkeypatch, str(file_of(tmp_path, step_models.accumulator())), *flags) == 1

    assert complaint in capsys.readouterr().err


def test_how_rows_are_run_is_told_with_what_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for content in (
        foreign_models.fixed_to_one(),
        step_models.size_dependent(leak=1e-8),
        foreign_models.hard_wired(),
    ):
        assert describe(monkeypatch, str(file_of(tmp_path, content))) == 0
        [line] = [line for line in capsys.readouterr().out.split("\n") if line.startswith("rows are run")]
        said.append(line)

    assert said[0].startswith("rows are run together; a step of 1 takes ")
    assert said[1].startswith("rows are run together, padded to 64 (bits depend on the batch's size")
    assert said[2].startswith(
        "rows are run one after another (the graph takes one session at a time); a step of 1"
    )


def test_rows_can_be_run_one_after_another_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, directory = (
        file_of(tmp_path, step_models.size_dependent(leak=1e-8)),
        tmp_path / "models" / "mine" / "1",
    )

    assert describe(monkeypatch, str(file), "--row-by-row", "--publish", str(directory)) == 0

    told = capsys.readouterr().out
    assert "gives, bit for bit;" in told
    assert "rows are run one after another; a step of 1 takes" in told
    found = spec.load(directory / "model.onnx", "mine", 1).spec
    assert [tensor.batch_axis for tensor in found.outputs] == [-1]


def test_a_version_that_is_there_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, directory = file_of(tmp_path, step_models.delay_line()), tmp_path / "mine" / "1"
    assert describe(monkeypatch, str(file), "--publish", str(directory)) == 0
    assert describe(monkeypatch, str(file), "--publish", str(directory)) == 1

    assert "publish the next one" in capsys.readouterr().err
    assert [path.name for path in directory.parent.iterdir()] == ["1"]
