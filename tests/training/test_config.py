"""Settings: where they come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config import CONFIGS, make_cell, read_settings, settings_class, write_settings
from training.errors import SettingsError
from training.model.dnc.heads import Improvements
from training.tasks import TASKS

COPY = CONFIGS / "copy.toml"


def test_the_command_line_wins_over_the_toml_and_the_toml_over_the_defaults(tmp_path):
    toml = tmp_path / "my.toml"
    toml.write_text(
        "run_dir = 'x'\nseed = 7\n[task]\nname = 'copy'\n[optimizer]\nlearning_rate = 1e-2\nmomentum = 0.5\n"
    )

    settings = read_settings(toml, ["--seed", "3", "--optimizer.learning-rate", "1e-5"], "test")

    assert settings.seed == 3
    assert settings.optimizer.learning_rate == 1e-5
    assert settings.optimizer.momentum == 0.5
    assert settings.optimizer.square_decay == 0.95


@pytest.mark.parametrize("flag", ["--run-dir", "--run_dir"])
def test_a_flag_may_be_typed_with_hyphens_or_underscores(flag):
    assert read_settings(COPY, [flag, "runs/x_y"], "test").run_dir == Path("runs/x_y")


def test_written_settings_read_back_the_same(tmp_path):
    settings = read_settings(COPY, ["--seed", "5", "--evaluation.long-sizes", "30,50"], "test")

    write_settings(settings, tmp_path / "settings.toml")

    assert settings.long_sizes == [(30,), (50,)]
    assert read_settings(tmp_path / "settings.toml", [], "test") == settings


def test_an_unknown_setting_in_a_toml_is_refused_with_the_name_it_may_have_meant(tmp_path):
    toml = tmp_path / "my.toml"
    toml.write_text("run_dir = 'x'\n[task]\nname = 'copy'\n[optimizer]\nlearning_rat = 1\n")

    with pytest.raises(SettingsError) as refusal:
        read_settings(toml, [], "test")

    assert str(refusal.value) == (
        f"unknown setting optimizer.learning_rat in {toml}, did you mean optimizer.learning_rate?"
    )


def test_an_unknown_flag_is_refused_by_the_name_that_was_typed():
    with pytest.raises(SettingsError, match=r"unrecognized arguments: --optimizer\.speed=3"):
        read_settings(COPY, ["--optimizer.speed=3"], "test")


@pytest.mark.parametrize("content", ["batch_size = ", "\xff\xfe"])
def test_a_toml_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "my.toml").write_text(content, encoding="latin-1")

    with pytest.raises(SettingsError, match=r"cannot read the settings in .*my\.toml"):
        read_settings(tmp_path / "my.toml", [], "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "[task]\nname = 'juggling'\n",
            "unknown task 'juggling': there are copy, repeat-copy, associative-recall",
        ),
        ("run_dir = 'x'\n", "names no task"),
        ("task = 3\n", "names no task"),
    ],
)
def test_a_task_that_is_unknown_or_not_named_is_refused_with_those_there_are(tmp_path, content, message):
    (tmp_path / "my.toml").write_text(content)

    with pytest.raises(SettingsError, match=message):
        read_settings(tmp_path / "my.toml", [], "test")


def test_a_setting_of_another_task_is_refused():
    with pytest.raises(SettingsError, match=r"unrecognized arguments: --task\.max-repeats=3"):
        read_settings(COPY, ["--task.max-repeats=3"], "test")


def test_a_missing_toml_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot read the settings"):
        read_settings(tmp_path / "none.toml", [], "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "batch_size: input should be greater than or equal to 1, not '0'"),
        (["--batch-size", "many"], "batch_size: input should be a valid integer"),
        (["--model.memory-rows", "0"], "model.memory_rows: "),
        (["--model.shift-reach", "64"], "model: shift_reach 64 needs memory_rows of at least 129, not 128"),
        (
            ["--model.controller", "transformer"],
            "model.controller: input should be 'lstm', 'gru', 'mgu' or 'feedforward', not 'transformer'",
        ),
        (["--task.min-length", "30"], "task: min_length 30 is greater than max_length 20"),
        (["--optimizer.learning-rate", "nan"], "optimizer.learning_rate: "),
        (["--optimizer.clip-norm", "-1"], "optimizer.clip_norm: "),
        (["--optimizer.weight-decay", "-1"], "optimizer.weight_decay: "),
        (["--model.num-read-heads", "0"], "model.num_read_heads: "),
        (
            ["--restart-every-updates", "150"],
            "restart_every_updates 150 needs evaluation.enough, and must be",
        ),
        (
            ["--model.architecture", "plain", "--model.controller", "feedforward"],
            "model: architecture plain needs a controller that remembers",
        ),
        (
            ["--evaluation.long-sizes", "0"],
            "evaluation.long_sizes: '0' is not a size of copy: length, such as 20",
        ),
        (
            ["--evaluation.long-sizes", "20x10"],
            "evaluation.long_sizes: '20x10' is not a size of copy",
        ),
        (
            ["--evaluation.long-memory-rows", "256", "--model.initial-memory", "learned"],
            "evaluation.long_memory_rows 256 needs a memory, with initial_memory and initial_attention constant",
        ),
        (["--evaluation.long-memory-rows", "2"], "evaluation.long_memory_rows 2 needs"),
        (["--evaluation.long-memory-rows", "256,512"], "evaluation.long_memory_rows has 2 numbers: give one"),
        (["--settled-memory-rows", "128,2"], "settled_memory_rows 2 needs a memory"),
        (["--seed", "-1"], "seed: "),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_name(arguments, message):
    with pytest.raises(SettingsError) as refusal:
        read_settings(COPY, arguments, "test")

    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_setting_has_a_sentence():
    def check(model):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)
            else:
                assert field.description, f"{name} has no sentence"
                assert field.description.rstrip().endswith("."), name

    for task in TASKS:
        check(settings_class(task))


def test_every_experiment_can_be_read():
    for toml in CONFIGS.glob("*.toml"):
        assert read_settings(toml, [], "test").run_dir == Path("runs") / toml.stem


def test_the_improvements_of_a_dnc_are_switches():
    settings = read_settings(COPY, ["--model.architecture=dnc", "--no-model.sharp-links"], "test")

    improvements = make_cell(settings).heads.sizes.improvements

    assert improvements == Improvements(masked_lookup=True, deallocation=True, sharp_links=False)


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--model.num-write-heads=2", "needs num_write_heads 1, not 2"),
        ("--model.initial-memory=learned", "needs initial_memory constant, not learned"),
        ("--model.initial-attention=learned", "needs initial_attention constant, not learned"),
    ],
)
def test_what_a_dnc_does_not_have_is_refused(flag, wanted):
    with pytest.raises(SettingsError, match=wanted):
        read_settings(COPY, ["--model.architecture=dnc", flag], "test")
