"""The command line: exit codes, and one sentence for what is refused."""

from __future__ import annotations

import pytest

from training.__main__ import main
from training.checkpoint import LAST, load


def refusal(capsys, arguments: list[str]) -> str:
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_help_names_the_experiments_and_shows_how_to_resume(capsys):
    assert main(["--help"]) == 0

    said = capsys.readouterr().out
    assert "The experiments are: associative-recall, " in said
    assert " copy, " in said
    assert "--resume" in said


def test_an_unknown_experiment_is_refused_with_those_there_are(capsys):
    assert "unknown experiment 'cpoy': there are associative-recall, " in refusal(capsys, ["cpoy"])


def test_an_unknown_flag_is_refused(capsys):
    assert "--lr=3" in refusal(capsys, ["copy", "--lr=3"])


def test_a_run_can_be_resumed_to_go_further_but_not_with_other_settings(capsys, tiny_arguments, tmp_path):
    where = ["--run-dir", str(tmp_path / "run")]
    assert main(["copy", *tiny_arguments, *where]) == 0

    assert "leave out all but" in refusal(capsys, ["copy", *where, "--resume", "--batch-size=3"])
    assert main(["copy", *where, "--resume", "--num-updates=14"]) == 0

    last = load(tmp_path / "run" / LAST)
    assert last.update == 14
    assert last.command.startswith("python -m training copy --model.memory-rows=8")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_directory_that_is_a_file_is_refused(capsys, tmp_path, resume):
    (tmp_path / "file").write_text("")

    refusal(capsys, ["copy", "--run-dir", str(tmp_path / "file"), *resume])


def test_a_run_that_was_moved_is_resumed_where_it_is_now(tiny_arguments, tmp_path):
    assert main(["copy", "--run-dir", str(tmp_path / "old"), *tiny_arguments, "--num-updates=3"]) == 0
    (tmp_path / "old").rename(tmp_path / "new")

    assert main(["copy", "--run-dir", str(tmp_path / "new"), "--num-updates=5", "--resume"]) == 0

    assert load(tmp_path / "new" / LAST).update == 5
    assert not (tmp_path / "old").exists()


def test_settings_changed_by_hand_do_not_change_a_run_that_is_resumed(tiny_arguments, tmp_path):
    where = ["--run-dir", str(tmp_path / "run")]
    assert main(["copy", *where, *tiny_arguments, "--num-updates=3"]) == 0
    (tmp_path / "run" / "settings.toml").write_text("batch_size = 64\n")

    assert main(["copy", *where, "--num-updates=5", "--resume"]) == 0

    assert load(tmp_path / "run" / LAST).settings["batch_size"] == 2


def test_a_run_cannot_be_resumed_to_go_less_far_than_it_has_come(capsys, tiny_arguments, tmp_path):
    where = ["--run-dir", str(tmp_path / "run")]
    assert main(["copy", *where, *tiny_arguments, "--num-updates=5"]) == 0

    assert "less than the 5 updates" in refusal(capsys, ["copy", *where, "--num-updates=3", "--resume"])


def test_rows_are_refused_for_a_network_without_a_memory(capsys, tiny_arguments, tmp_path):
    run = tmp_path / "run"
    assert main(["copy", *tiny_arguments, "--model.architecture=plain", f"--run-dir={run}"]) == 0

    assert "a plain network, without a memory" in refusal(capsys, ["evaluate", str(run), "--memory-rows=16"])


@pytest.mark.parametrize(
    "absurd",
    [
        "--model.memory-rows=100000000000",
        "--model.memory-rows=99999999999999999999999999",
        "--model.row-width=10000000000",
        "--model.controller-size=1000000",
        "--model.controller-layers=1000000000",
        "--model.num-read-heads=1000000000",
        "--batch-size=1000000000000",
        "--task.num-bits=10000000000",
        "--task.max-length=1000000000000",
        "--evaluation.long-sizes=99999999999999999999",
        "--num-threads=100000",
        "--precision=16-mixed",
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(capsys, tmp_path, absurd):
    refusal(capsys, ["copy", f"--run-dir={tmp_path / 'run'}", "--num-updates=1", absurd])

    assert not (tmp_path / "run").exists()


def test_what_turns_out_not_to_fit_into_memory_is_said(capsys, tiny_arguments, tmp_path):
    where = tmp_path / "run"
    assert main(["copy", *tiny_arguments, "--num-updates=5", f"--run-dir={where}"]) == 0

    more = ["--sizes=9999999", "--num-sequences=9999999", "--patterns=none"]
    assert "more memory than there is" in refusal(capsys, ["evaluate", str(where), *more])


def test_more_seeds_than_can_be_meant_are_refused(capsys, tmp_path):
    assert "more than" in refusal(
        capsys, ["sweep", "copy", "--seeds=0-99999999999", "--to", str(tmp_path / "sweep")]
    )


@pytest.mark.parametrize(("rows", "is_told"), [(30, True), (32, False)])
def test_rows_that_export_will_refuse_are_told_before_the_training(
    capsys, tiny_arguments, tmp_path, rows, is_told
):
    main(["copy", *tiny_arguments, f"--model.memory-rows={rows}", f"--run-dir={tmp_path / 'run'}"])

    said = capsys.readouterr().err
    assert (f"note: export will refuse this model, whose memory_rows {rows}" in said) == is_told
    assert not is_told or said.index("note:") < said.index("sequences")


def test_a_run_is_resumed_with_a_lower_learning_rate_and_not_with_a_higher_one(
    capsys, tiny_arguments, tmp_path
):
    where = ["--run-dir", str(tmp_path / "run")]
    assert main(["copy", *tiny_arguments, *where, "--num-updates=2"]) == 0
    more = ["copy", *where, "--resume", "--num-updates=3"]

    assert "only be resumed with a lower one" in refusal(capsys, [*more, "--optimizer.learning-rate=1"])
    assert main([*more, "--optimizer.learning-rate=1e-5"]) == 0
