"""The training loop: what it records, when it stops, and that a run goes on as if it had never stopped."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import checkpoint, loop
from training.__main__ import main
from training.checkpoint import BEST, LAST
from training.config import make_cell, read_settings
from training.errors import CheckpointError, NonFiniteError, RunDirectoryError, SettingsError
from training.loop import SETTINGS, train
from training.model import NTMCell
from training.records import METRICS, Records

ROOT = Path(__file__).parents[2]


def run(settings, *, resume: bool = False):
    return train(settings, "the command", resume=resume, console=Console(quiet=True))


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = checkpoint.load(a / LAST), checkpoint.load(b / LAST)
    assert ours.update == theirs.update
    assert ours.cell.keys() == theirs.cell.keys()
    assert all(torch.equal(ours.cell[name], theirs.cell[name]) for name in ours.cell)
    for index, moments in ours.optimizer["state"].items():
        assert all(torch.equal(moments[name], theirs.optimizer["state"][index][name]) for name in moments)


def start(arguments: list[str], run_dir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "training", "copy", *arguments, "--run-dir", str(run_dir)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_evaluation(process: subprocess.Popen, number: int) -> None:
    """Read what the process says until its nth evaluation, one every 5 updates."""
    said = ""
    for line in process.stderr:
        said += line
        if said.count("wrong bits at 5") == number:
            return
    pytest.fail(f"training ended early: {said}")


def test_a_run_leaves_settings_checkpoints_and_a_record_of_every_update(tiny_settings):
    settings = tiny_settings()

    run(settings)

    assert read_settings(settings.run_dir / SETTINGS, [], "test") == settings
    kept = records(settings.run_dir)
    assert [record["update"] for record in kept] == list(range(1, 13))
    assert kept[-1]["sequences"] == 24
    assert {"loss", "wrong_bits_in_training", "gradient_norm", "seconds", "cpu_seconds", "steps"} <= kept[
        0
    ].keys()
    assert [record["update"] for record in kept if "wrong_bits" in record] == [5, 10, 12]
    assert any((settings.run_dir / "tensorboard").iterdir())
    last = checkpoint.load(settings.run_dir / LAST)
    assert (last.update, last.command) == (12, "the command")
    assert last.metrics.keys() == {"wrong_bits", "cost_bits", "wrong_bits_at_5"}


def test_the_best_checkpoint_is_the_last_of_those_that_did_best(tiny_settings, monkeypatch):
    settings = tiny_settings("--evaluation.every-updates=3")
    scores = iter([3.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr("training.loop.evaluate", lambda *_arguments: {"wrong_bits": next(scores)})

    run(settings)

    best = checkpoint.load(settings.run_dir / BEST)
    assert (best.update, best.best_score) == (9, 1.0)


def test_the_progress_bar_shows_loss_wrong_bits_speed_and_the_time_left(tiny_settings):
    screen = io.StringIO()

    train(
        tiny_settings(),
        "the command",
        resume=False,
        console=Console(file=screen, force_terminal=True, width=160),
    )

    shown = screen.getvalue()
    for part in (r"12/12", r"loss \d\.\d{4}", r"wrong bits +\d+\.\d\d", r"\d+ sequences/s", r"\d:\d\d:\d\d"):
        assert re.search(part, shown), part


def test_tensorboard_has_every_update_once_also_after_a_resume(tiny_settings):
    settings = tiny_settings("--num-updates=10", "--checkpoint-every-updates=4")
    run(settings)
    # As a process that died at update 10 leaves it, when its last checkpoint was the one of update 8.
    last = checkpoint.load(settings.run_dir / LAST)
    run(tiny_settings("--num-updates=8", f"--run-dir={settings.run_dir}-8", "--checkpoint-every-updates=4"))
    shutil.copy(settings.run_dir.with_name(f"{settings.run_dir.name}-8") / LAST, settings.run_dir / LAST)

    run(settings, resume=True)

    events = EventAccumulator(str(settings.run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))
    assert checkpoint.load(settings.run_dir / LAST).update == last.update == 10


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny_settings, tmp_path):
    first, second, third = (
        tiny_settings(f"--run-dir={tmp_path / name}", f"--seed={seed}")
        for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )

    for settings in (first, second, third):
        run(settings)

    assert_same_weights(first.run_dir, second.run_dir)
    with pytest.raises(AssertionError):
        assert_same_weights(first.run_dir, third.run_dir)


def test_once_the_task_is_solved_the_learning_rate_drops_and_stays_down_after_a_resume(
    tiny_settings, monkeypatch
):
    monkeypatch.setattr("training.loop.is_solved", lambda *_arguments: True)
    settings = ["--optimizer.settled-learning-rate=1e-4", "--optimizer.settle-below=1000"]
    run(tiny_settings("--num-updates=6", *settings))
    run(tiny_settings("--num-updates=8", *settings), resume=True)

    last = checkpoint.load(tiny_settings().run_dir / LAST)
    assert last.solved["update"] == 5
    assert [group["lr"] for group in last.optimizer["param_groups"]] == [1e-4]


def test_the_learning_rate_can_drop_before_the_task_is_solved(tiny_settings):
    run(tiny_settings("--num-updates=6", "--optimizer.settle-below=100"))

    last = checkpoint.load(tiny_settings().run_dir / LAST)
    assert last.solved == {}
    assert last.optimizer["param_groups"][0]["lr"] == tiny_settings().optimizer.settled_learning_rate


def test_a_linear_schedule_falls_to_0_at_the_last_update(tiny_settings):
    run(tiny_settings("--optimizer.schedule=linear", "--optimizer.learning-rate=0.012"))

    last = checkpoint.load(tiny_settings().run_dir / LAST)
    assert last.optimizer["param_groups"][0]["lr"] == pytest.approx(
        0.001
    )  # 12 updates: the step of the last one.


@pytest.mark.parametrize("name", ["rmsprop", "graves-rmsprop", "adam"])
def test_weights_decay(tiny_settings, name):
    settings = [f"--optimizer.name={name}", "--num-updates=2"]
    run(plain := tiny_settings(*settings))
    run(decaying := tiny_settings(*settings, "--optimizer.weight-decay=1", "--run-dir", f"{plain.run_dir}-2"))

    def norm(settings):
        weights = checkpoint.load(settings.run_dir / LAST).cell.values()
        return sum(float(weight.square().sum()) for weight in weights)

    assert norm(decaying) < norm(plain)


def test_a_run_ends_once_its_model_is_as_good_as_it_needs_to_be(tiny_settings, monkeypatch):
    monkeypatch.setattr("training.loop.evaluate", lambda *_arguments: {"wrong_bits": 0.3})
    settings = tiny_settings("--evaluation.enough=0.3")

    assert run(settings) is None

    assert checkpoint.load(settings.run_dir / LAST).update == 5
    assert run(settings, resume=True) is None
    assert checkpoint.load(settings.run_dir / LAST).update == 5


def test_a_run_whose_model_is_not_good_enough_begins_again_and_keeps_its_best(
    tiny_settings, tmp_path, monkeypatch
):
    scores = iter([9.0, 3.0, 8.0, 7.0, 2.0, 0.0])
    monkeypatch.setattr("training.loop.evaluate", lambda *_arguments: {"wrong_bits": next(scores)})
    restart = ["--restart-every-updates=4", "--evaluation.every-updates=2", "--evaluation.enough=0"]
    settings = tiny_settings(*restart)
    run(settings)

    steps = [record["gradient_norm"] for record in records(settings.run_dir)]
    assert len(set(steps)) == len(steps) == 12
    last = checkpoint.load(settings.run_dir / LAST)
    assert {int(state["step"]) for state in last.optimizer["state"].values()} == {4}
    assert last.best_score == 0

    # And one that is killed in between makes the same attempts.
    scores = iter([9.0, 3.0, 8.0, 7.0, 2.0, 0.0])
    parts = tiny_settings(*restart, f"--run-dir={tmp_path / 'parts'}", "--num-updates=6")
    run(parts)
    run(parts.model_copy(update={"num_updates": 12}), resume=True)
    assert_same_weights(settings.run_dir, parts.run_dir)


def test_a_run_ends_at_its_limit_of_processor_time_and_goes_on_with_a_higher_one(tiny_settings):
    settings = tiny_settings("--cpu-minutes=1e-9")

    assert run(settings) is None

    assert checkpoint.load(settings.run_dir / LAST).update == 0
    run(tiny_settings("--cpu-minutes=5"), resume=True)
    last = checkpoint.load(settings.run_dir / LAST)
    assert last.update == 12
    assert 0 < last.cpu_seconds < 60


def test_what_is_judged_and_exported_is_the_running_mean_of_the_weights(tiny_settings):
    settings = tiny_settings(
        "--optimizer.average-decay=0.5", "--num-updates=3", "--evaluation.every-updates=1"
    )
    weights = []
    step = torch.optim.RMSprop.step

    def seen(optimizer, *arguments):
        step(optimizer, *arguments)
        weights.append(optimizer.param_groups[0]["params"][0].detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.RMSprop, "step", seen)
        run(settings)

    mean = weights[0]
    for weight in weights[1:]:
        mean = 0.5 * mean + 0.5 * weight
    last = checkpoint.load(settings.run_dir / LAST)
    name = next(iter(dict(make_cell(settings).named_parameters())))
    torch.testing.assert_close(last.averaged[name], mean)
    torch.testing.assert_close(checkpoint.restore_cell(last)[0].state_dict()[name], mean)
    assert not torch.equal(last.cell[name], mean)


def test_records_that_cannot_be_written_end_the_run_and_leave_the_last_checkpoint(tiny_settings, monkeypatch):
    settings = tiny_settings()
    add = Records.add

    def full(records, update, values):
        if update == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(records, update, values)

    monkeypatch.setattr(Records, "add", full)

    with pytest.raises(
        RunDirectoryError, match=r"cannot be written to .*No space left.* make room and --resume"
    ):
        run(settings)

    assert checkpoint.load(settings.run_dir / LAST).update == 4
    monkeypatch.undo()
    run(settings, resume=True)
    assert [record["update"] for record in records(settings.run_dir)] == list(range(1, 13))


def test_a_gpu_that_is_not_there_is_said(tiny_settings):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    settings = tiny_settings("--device=cuda")

    with pytest.raises(SettingsError, match="device cuda: torch finds no GPU here"):
        run(settings)

    assert not settings.run_dir.exists()


def test_half_the_precision_trains_without_the_kernel(tiny_settings):
    settings = tiny_settings("--precision=bf16-mixed", "--num-updates=3")

    run(settings)

    assert [record["update"] for record in records(settings.run_dir)] == [1, 2, 3]
    assert all(
        tensor.dtype == torch.float32 for tensor in checkpoint.load(settings.run_dir / LAST).cell.values()
    )


def test_a_run_that_is_resumed_to_go_further_gives_what_one_that_never_stopped_gives(
    tiny_settings, tmp_path, monkeypatch
):
    """Also when the evaluation at its first end, where none was due, found the task solved."""
    monkeypatch.setattr("training.loop.is_solved", lambda *_arguments: True)
    settle = "--optimizer.settle-below=1000"
    further, unbroken = f"--run-dir={tmp_path / 'further'}", f"--run-dir={tmp_path / 'unbroken'}"

    run(tiny_settings("--num-updates=4", further, settle))
    run(tiny_settings("--num-updates=8", further, settle), resume=True)
    run(tiny_settings("--num-updates=8", unbroken, settle))

    assert_same_weights(tmp_path / "further", tmp_path / "unbroken")


def test_a_run_killed_between_checkpoints_resumes_to_the_same_weights_bit_for_bit(tiny_arguments, tmp_path):
    # So many updates that the killed process cannot end before it is seen at update 40.
    arguments = [*tiny_arguments, "--num-updates=100000", "--checkpoint-every-updates=25"]
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"

    with start(arguments, killed) as process:
        wait_for_evaluation(process, 8)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    reached = checkpoint.load(killed / LAST).update
    end = reached + 30
    # The dead process recorded updates after its last checkpoint, the last of them perhaps by half.
    with (killed / METRICS).open("a") as file:
        file.write('{"update": 99')
    assert main(["copy", f"--run-dir={killed}", f"--num-updates={end}", "--resume"]) == 0
    assert main(["copy", f"--run-dir={unbroken}", *arguments, f"--num-updates={end}"]) == 0

    assert reached >= 25
    assert_same_weights(killed, unbroken)
    assert [record["update"] for record in records(killed)] == list(range(1, end + 1))
    assert [record["loss"] for record in records(killed)] == [record["loss"] for record in records(unbroken)]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_batch_saves_and_says_how_to_resume(tiny_arguments, tmp_path, stop):
    run_dir = tmp_path / "run"

    with start([*tiny_arguments, "--num-updates=100000"], run_dir) as process:
        wait_for_evaluation(process, 1)
        process.send_signal(stop)
        said = process.stderr.read()
        assert process.wait() == 128 + stop

    assert f"saved; go on with: python -m training copy --run-dir {run_dir} --resume" in said
    assert "Traceback" not in said
    assert checkpoint.load(run_dir / LAST).update == records(run_dir)[-1]["update"]


def test_a_run_directory_in_use_is_refused_and_left_alone(tiny_settings):
    settings = tiny_settings("--num-updates=2")
    run(settings)
    before = (settings.run_dir / LAST).read_bytes()

    with pytest.raises(RunDirectoryError, match=r"holds a run: give another --run-dir, or go on .* --resume"):
        run(settings)

    assert (settings.run_dir / LAST).read_bytes() == before


def test_two_processes_cannot_train_in_one_run_directory(tiny_arguments, tiny_settings, tmp_path):
    with start([*tiny_arguments, "--num-updates=100000"], tmp_path / "run") as process:
        wait_for_evaluation(process, 1)

        with pytest.raises(RunDirectoryError, match="another process is training in"):
            run(tiny_settings(), resume=True)

        process.kill()


def test_resuming_where_there_is_no_run_is_refused(tiny_settings):
    with pytest.raises(RunDirectoryError, match="there is no run in"):
        run(tiny_settings(), resume=True)


def test_resuming_without_a_checkpoint_is_refused_and_destroys_nothing(tiny_settings):
    settings = tiny_settings("--num-updates=5")
    run(settings)
    (settings.run_dir / LAST).unlink()
    kept = {path: path.read_bytes() for path in (settings.run_dir / BEST, settings.run_dir / METRICS)}

    with pytest.raises(CheckpointError, match="has no checkpoint last"):
        run(settings, resume=True)

    assert {path: path.read_bytes() for path in kept} == kept


def test_a_run_that_died_before_its_first_update_can_be_started_again(tiny_settings):
    settings = tiny_settings("--num-updates=2")
    settings.run_dir.mkdir()
    (settings.run_dir / "lock").touch()

    run(settings)

    assert checkpoint.load(settings.run_dir / LAST).update == 2


def test_resuming_from_a_truncated_checkpoint_is_refused(tiny_settings):
    settings = tiny_settings("--num-updates=2")
    run(settings)
    path = settings.run_dir / LAST
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(CheckpointError, match="is truncated"):
        run(settings, resume=True)


def spoil(monkeypatch, settings, what: str, is_spoiled) -> None:
    """Have some updates, by their number, end in a loss or a gradient that is no number."""
    costs_of = type(settings.task.loss).costs
    calls = []

    def spoiled(self, answers, targets):
        if not answers.requires_grad:  # An evaluation.
            return costs_of(self, answers, targets)
        calls.append(1)
        if not is_spoiled(len(calls)):
            return costs_of(self, answers, targets)
        if what == "loss":
            return costs_of(self, answers, targets) * float("nan")
        # Its value is 0 and its gradient infinite.
        return (answers.sum() * 0).sqrt().expand(targets.shape[:2])

    monkeypatch.setattr(type(settings.task.loss), "costs", spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_an_update_that_would_not_be_finite_is_skipped_said_and_counted(tiny_settings, monkeypatch, what):
    settings, screen = tiny_settings("--restart-every-updates=None"), io.StringIO()
    spoil(monkeypatch, settings, what, lambda update: update in (6, 9))

    train(settings, "the command", resume=False, console=Console(file=screen, width=200))

    assert f"at update 6 the {what} is nan: the update is skipped" in screen.getvalue()
    kept = records(settings.run_dir)
    assert [record["update"] for record in kept] == list(range(1, 13))
    assert kept[5]["gradient_norm"] is None
    assert [record.get("skipped_updates", 0) for record in kept] == [0] * 5 + [1] * 3 + [2] * 4
    last = checkpoint.load(settings.run_dir / LAST)
    assert (last.num_skipped, last.num_skipped_in_a_row, last.num_diverged) == (2, 0, 0)
    assert {int(state["step"]) for state in last.optimizer["state"].values()} == {10}


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_where_no_update_can_be_made_the_run_stops_and_keeps_the_last_good_checkpoint(
    tiny_settings, monkeypatch, what
):
    settings = tiny_settings(
        "--checkpoint-every-updates=3", "--num-updates=40", "--restart-every-updates=None"
    )
    spoil(monkeypatch, settings, what, lambda update: update >= 6)

    with pytest.raises(
        NonFiniteError, match=rf"at update 15 the {what} is nan.*last good checkpoint is kept"
    ):
        run(settings)

    last = checkpoint.load(settings.run_dir / LAST)
    assert last.update == 3
    assert all(tensor.isfinite().all() for tensor in last.cell.values())
    monkeypatch.undo()
    run(settings, resume=True)
    assert [record["update"] for record in records(settings.run_dir)] == list(range(1, 41))


def test_a_run_that_tries_again_begins_again_where_it_diverges(tiny_settings, monkeypatch):
    settings = tiny_settings("--restart-every-updates=10", "--evaluation.enough=0")
    spoil(monkeypatch, settings, "loss", lambda update: update == 6)

    run(settings)

    kept = records(settings.run_dir)
    assert [record["update"] for record in kept if "restarted" in record] == [6, 11]
    last = checkpoint.load(settings.run_dir / LAST)
    assert (last.num_diverged, last.num_skipped) == (1, 0)
    assert {int(state["step"]) for state in last.optimizer["state"].values()} == {2}


def test_gradients_whose_norm_alone_overflows_are_clipped(tiny_settings, monkeypatch):
    settings = tiny_settings("--num-updates=2", "--optimizer.name=adam")
    costs_of, norms = type(settings.task.loss).costs, []
    monkeypatch.setattr(type(settings.task.loss), "costs", lambda *arguments: costs_of(*arguments) * 1e30)
    step = torch.optim.Adam.step

    def seen(optimizer, *arguments):
        gradients = [weight.grad.double() for group in optimizer.param_groups for weight in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", seen)

    run(settings)

    assert all(record["gradient_norm"] > 1e22 for record in records(settings.run_dir))
    assert norms == pytest.approx([settings.optimizer.clip_norm] * 2, rel=1e-5)


def test_a_model_whose_answers_are_no_numbers_is_never_kept_as_the_best(tiny_settings, monkeypatch):
    settings = tiny_settings("--evaluation.every-updates=1", "--checkpoint-every-updates=1")
    monkeypatch.setattr(
        "training.loop.evaluate", lambda *_arguments: {"wrong_bits": float("inf"), "cost_bits": float("inf")}
    )

    with pytest.raises(NonFiniteError, match="no evaluation found answers that are finite numbers"):
        run(settings)

    assert not (settings.run_dir / BEST).exists()
    assert records(settings.run_dir)[0]["wrong_bits"] is None


def test_the_case_that_was_kept_as_the_best_with_a_cost_of_nan(tmp_path):
    arguments = ["copy", "--optimizer.learning-rate=1e20", "--evaluation.every-updates=1"]
    arguments += ["--checkpoint-every-updates=1", "--restart-every-updates=100", "--num-updates=6"]
    arguments += ["--evaluation.long-sizes=40", "--model.memory-rows=8", f"--run-dir={tmp_path / 'run'}"]

    main(arguments)

    for record in records(tmp_path / "run"):
        assert all(value is None or abs(value) < float("inf") for value in record.values())
    assert "NaN" not in (tmp_path / "run" / METRICS).read_text()
    for name in {LAST, BEST} & {path.name for path in (tmp_path / "run").iterdir()}:
        kept = checkpoint.load(tmp_path / "run" / name)
        assert checkpoint.is_finite(kept.cell)
        assert name == LAST or kept.best_score < float("inf")


@pytest.mark.parametrize("average_decay", [0, 0.5])
def test_a_run_resumed_at_the_boundary_of_an_attempt_is_the_unbroken_one(
    tiny_settings, tmp_path, average_decay
):
    restart = ["--restart-every-updates=5", "--evaluation.enough=0"]
    restart += [f"--optimizer.average-decay={average_decay}"]
    parts, unbroken = f"--run-dir={tmp_path / 'parts'}", f"--run-dir={tmp_path / 'unbroken'}"

    run(tiny_settings(*restart, parts, "--num-updates=5"))
    run(tiny_settings(*restart, parts, "--num-updates=7"), resume=True)
    run(tiny_settings(*restart, parts, "--num-updates=10"), resume=True)
    run(tiny_settings(*restart, unbroken, "--num-updates=10"))

    assert_same_weights(tmp_path / "parts", tmp_path / "unbroken")
    ours, theirs = checkpoint.load(tmp_path / "parts" / LAST), checkpoint.load(tmp_path / "unbroken" / LAST)
    assert all(torch.equal(ours.averaged[name], theirs.averaged[name]) for name in ours.averaged)
    assert [record["loss"] for record in records(tmp_path / "parts")] == [
        record["loss"] for record in records(tmp_path / "unbroken")
    ]


def test_a_run_whose_first_checkpoint_could_not_be_written_can_be_started_again(tiny_settings, monkeypatch):
    settings = tiny_settings("--num-updates=2")
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:  # The records come first.
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="there was none before; make room and start the run again"):
        run(settings)
    monkeypatch.undo()

    run(settings)

    assert checkpoint.load(settings.run_dir / LAST).update == 2


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(tiny_settings):
    settings = tiny_settings("--num-updates=2")
    for name in ("lock", SETTINGS, METRICS, "last.tmp"):
        settings.run_dir.mkdir(exist_ok=True)
        (settings.run_dir / name).touch()
    (settings.run_dir / "tensorboard").mkdir()

    run(settings)

    assert checkpoint.load(settings.run_dir / LAST).update == 2


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--num-updates=2"], "all 2 updates are made; --resume with a greater --num-updates"),
        (
            ["--cpu-minutes=1e-9"],
            "minutes of processor time are used up; --resume with a greater --cpu-minutes",
        ),
        (["--evaluation.enough=1e9"], "and 1e+09 is enough; --resume with a lesser --evaluation.enough"),
    ],
)
def test_a_run_that_is_over_says_why_and_how_to_go_further(tiny_settings, more, reason):
    settings = tiny_settings(*more)
    for resume in (False, True):
        screen = io.StringIO()

        train(settings, "the command", resume=resume, console=Console(file=screen, width=400))

        assert reason in screen.getvalue()
    assert "there is nothing to do" in screen.getvalue()


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_run_directory_that_cannot_be_is_refused(tiny_settings, tmp_path, name):
    (tmp_path / "file").touch()
    settings = tiny_settings(f"--run-dir={tmp_path / name}")

    for resume in (False, True):
        with pytest.raises(RunDirectoryError):
            run(settings, resume=resume)


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda last: last._replace(optimizer={}),
        lambda last: last._replace(optimizer={"state": {}, "param_groups": [{"params": [0]}]}),
        lambda last: last._replace(
            optimizer=last.optimizer
            | {"state": {key: {"step": moments["step"]} for key, moments in last.optimizer["state"].items()}}
        ),
        lambda last: last._replace(
            optimizer=last.optimizer
            | {
                "state": {
                    key: moments | {"square_avg": torch.zeros(7)}
                    for key, moments in last.optimizer["state"].items()
                }
            }
        ),
        lambda last: last._replace(random_state=torch.zeros(3, dtype=torch.uint8)),
        lambda last: last._replace(sequences_state="no tensor"),
    ],
)
def test_a_state_of_optimiser_or_generator_that_does_not_fit_is_refused(tiny_settings, spoiled):
    settings = tiny_settings("--num-updates=2")
    run(settings)
    checkpoint.save(spoiled(checkpoint.load(settings.run_dir / LAST)), settings.run_dir / LAST)

    with pytest.raises(CheckpointError, match="does not fit"):
        run(tiny_settings("--num-updates=4"), resume=True)


def test_a_run_that_is_resumed_with_other_libraries_says_so(tiny_settings):
    run(tiny_settings("--num-updates=2"))
    path, screen = tiny_settings().run_dir / LAST, io.StringIO()
    last = checkpoint.load(path)
    checkpoint.save(last._replace(versions=last.versions | {"torch": "1.0"}), path)

    train(tiny_settings(), "the command", resume=True, console=Console(file=screen, width=400))

    assert f"the run goes on with torch {last.versions['torch']} instead of 1.0, and may" in screen.getvalue()


def test_damaged_lines_of_the_records_are_left_out_and_the_others_kept(tiny_settings):
    run(tiny_settings("--num-updates=10"))
    path, screen = tiny_settings().run_dir / METRICS, io.StringIO()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2], lines[4], lines[6] = b"\xff\xfe\n", b'{"update": 5, "loss": \n', b"[1]\n"
    path.write_bytes(b"".join(lines) + b'{"update": 11, "lo')

    train(tiny_settings(), "the command", resume=True, console=Console(file=screen, width=400))

    assert [record["update"] for record in records(path.parent)] == [1, 2, 4, 6, 8, 9, 10, 11, 12]
    assert "the records of 3 updates are damaged or missing" in screen.getvalue()


def test_a_run_is_resumed_with_smaller_steps(tiny_settings):
    run(tiny_settings("--num-updates=2", "--optimizer.learning-rate=1e-2"))

    run(tiny_settings("--num-updates=3", "--optimizer.learning-rate=1e-3"), resume=True)

    last = checkpoint.load(tiny_settings().run_dir / LAST)
    assert last.optimizer["param_groups"][0]["lr"] == 1e-3


def test_a_run_that_ends_early_has_no_time_left_to_show(tiny_settings):
    screen = io.StringIO()
    settings = tiny_settings("--evaluation.enough=1e9", "--num-updates=100000")

    train(settings, "c", resume=False, console=Console(file=screen, force_terminal=True, width=160))

    assert "5/5" in screen.getvalue()
    assert re.findall(r"\d:\d\d:\d\d", screen.getvalue())[-1] == "0:00:00"


def test_once_it_is_solved_updates_are_made_over_other_memory_rows_as_well(tiny_settings, monkeypatch):
    settings = tiny_settings("--settled-memory-rows=8,20", "--num-updates=40")
    monkeypatch.setattr(loop, "is_solved", lambda _scores, _task: True)  # From the first evaluation on, at 5.
    started, initial_state = [], NTMCell.initial_state
    monkeypatch.setattr(
        NTMCell,
        "initial_state",
        lambda cell, batch_size, rows=None: started.append(rows) or initial_state(cell, batch_size, rows),
    )

    run(settings)

    drawn = [rows for rows in started if rows in (8, 20) and rows is not None]
    assert set(drawn) == {8, 20}
    assert checkpoint.load(settings.run_dir / LAST).cell["initial_memory"].shape == (8, 4)


def test_a_run_over_several_numbers_of_rows_is_resumed_to_the_bit(tiny_settings, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "is_solved", lambda _scores, _task: True)
    settings = ["--settled-memory-rows=8,20", "--num-updates=14"]
    run(tiny_settings(*settings, f"--run-dir={tmp_path / 'unbroken'}"))
    first = tiny_settings(*settings, f"--run-dir={tmp_path / 'broken'}")
    run(first.model_copy(update={"num_updates": 10}))

    run(first, resume=True)

    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")
