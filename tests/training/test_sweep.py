"""Sweeps make every run once, also when they are stopped in between, and sum up what became of them."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from training import checkpoint
from training.__main__ import main
from training.checkpoint import LAST
from training.errors import SettingsError
from training.sweep import tables, variations


def sweep(folder, tiny_arguments, *more: str) -> int:
    return main(["sweep", "copy", "--to", str(folder), *tiny_arguments, *more])


def test_every_seed_is_combined_with_every_value():
    runs = variations("0-1,7", ["optimizer.learning-rate=1e-3,1e-4"])

    assert len(runs) == 6
    assert {"optimizer.learning-rate": "1e-4", "seed": "7"} in runs


@pytest.mark.parametrize(
    ("seeds", "vary"), [("x", []), ("3-1", []), ("", []), ("0", ["lr"]), ("0", ["lr="]), ("0", ["=3"])]
)
def test_what_is_no_list_of_seeds_or_values_is_refused(seeds, vary):
    with pytest.raises(SettingsError, match="is not"):
        variations(seeds, vary)


def test_a_sweep_goes_on_with_what_has_not_ended_and_leaves_the_rest_alone(capsys, tiny_arguments, tmp_path):
    """One run has ended, one was stopped after 4 updates, one has not begun."""
    common = [*tiny_arguments, "--optimizer.learning-rate=1e-3"]
    assert main(["copy", *common, "--seed=0", f"--run-dir={tmp_path / 'seed=0'}"]) == 0
    stopped = tmp_path / "seed=1"
    assert main(["copy", *common, "--seed=1", f"--run-dir={stopped}", "--num-updates=4"]) == 0
    last = checkpoint.load(stopped / LAST)
    checkpoint.save(last._replace(settings=last.settings | {"num_updates": 12}), stopped / LAST)
    ended = (tmp_path / "seed=0" / LAST).stat().st_mtime_ns

    assert sweep(tmp_path, common, "--seeds=0-2") == 0

    assert (tmp_path / "seed=0" / LAST).stat().st_mtime_ns == ended
    assert [checkpoint.load(tmp_path / f"seed={seed}" / LAST).update for seed in (0, 1, 2)] == [12, 12, 12]
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["run"] for row in rows] == ["seed=0", "seed=1", "seed=2"]
    assert {"solved_at_sequences", "solved_at_cpu_minutes", "sequences", "cpu_minutes", "wrong_bits"} <= rows[
        0
    ].keys()
    assert rows[0]["sequences"] == 24
    assert "seed=2" in capsys.readouterr().out


def test_a_summary_breaks_no_word_on_a_terminal_of_80_columns():
    row = {"run": "learning-rate=1e-3,seed=0", "solved_at_sequences": None, "solved_at_cpu_minutes": 1.25}
    row |= {"sequences": 640000, "cpu_minutes": 120.1, "wrong_bits": 1.667, "cost_bits": 3.9521}
    row |= {"wrong_bits_at_120": 1234.5}
    screen = Console(width=80, record=True, file=io.StringIO())

    for table in tables([row, {"run": "seed=1", "sequences": 3}], 80):
        screen.print(table)

    said = screen.export_text()
    for words in row:
        assert all(word in said for word in words.split("_")), words
    assert {"640000", "learning-rate=1e-3,seed=0", "1234"} <= set(said.replace("│", " ").split())
    assert max(map(len, said.splitlines())) <= 80


def test_a_run_that_fails_is_named_and_the_others_are_made(capsys, tiny_arguments, tmp_path):
    (tmp_path / "seed=0").mkdir()
    (tmp_path / "seed=0" / "notes.txt").write_text("somebody's")

    assert sweep(tmp_path, tiny_arguments, "--seeds=0-1", "--jobs=2") == 1

    said = capsys.readouterr().err
    assert "seed=0 holds other files than a new run: give another --run-dir" in said
    assert "1 of 2 runs failed: seed=0; once what they say is mended, give the command again" in said
    assert checkpoint.load(tmp_path / "seed=1" / LAST).update == 12
    assert (tmp_path / "seed=0" / "notes.txt").read_text() == "somebody's"


def test_a_run_that_diverged_is_not_to_be_tried_again_with_the_same_settings(
    capsys, tiny_arguments, tmp_path
):
    rates = "--vary=optimizer.learning-rate=1e-3,1e30"
    more = ["--num-updates=20", "--restart-every-updates=None"]

    assert sweep(tmp_path, tiny_arguments, *more, rates) == 1

    said = capsys.readouterr().err
    assert "1 of 2 runs diverged: learning-rate=1e30,seed=0; with these settings they will again" in said
    assert "give the command again" not in said
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 2


def test_a_damaged_run_is_named_and_keeps_none_of_the_others_out_of_the_summary(
    capsys, tiny_arguments, tmp_path
):
    arguments = [*tiny_arguments, "--num-updates=1"]
    for seed in (0, 1):
        main(["copy", *arguments, f"--seed={seed}", f"--run-dir={tmp_path / f'seed={seed}'}"])
    damaged = bytearray((tmp_path / "seed=0" / LAST).read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "seed=0" / LAST).write_bytes(damaged)

    assert sweep(tmp_path, arguments, "--seeds=0-1") == 1

    assert "last.pt is damaged" in capsys.readouterr().err
    assert [row["run"] for row in json.loads((tmp_path / "summary.json").read_text())] == ["seed=1"]


def test_a_folder_that_cannot_be_is_refused(capsys, tiny_arguments, tmp_path):
    (tmp_path / "file").touch()

    assert sweep(tmp_path / "file" / "sweep", tiny_arguments) == 1

    assert "cannot be a folder" in capsys.readouterr().err


def test_a_setting_that_cannot_work_is_refused_before_any_run_is_made(capsys, tiny_arguments, tmp_path):
    assert sweep(tmp_path / "sweep", tiny_arguments, "--vary=batch-size=2,0") == 1

    assert "batch_size: input should be greater than or equal to 1" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
