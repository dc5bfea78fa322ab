"""The command line: `python -m training copy --seed 3 --run-dir runs/copy`.

Settings are read here and nowhere else; `loop.py` does the work.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from training import checkpoint
from training.checkpoint import LAST
from training.config import CONFIGS, Settings, read_settings, resolve
from training.errors import SettingsError, TrainingError
from training.loop import train

_USAGE = """\
usage: python -m training EXPERIMENT [--resume] [--SETTING VALUE ...]

Train a Neural Turing Machine. The experiments are: {experiments}.

  python -m training copy                                        train in runs/copy
  python -m training copy --seed 3 --run-dir runs/copy3          another seed, elsewhere
  python -m training copy --optimizer.learning-rate 5e-4         any setting of the experiment
  python -m training copy --resume                               go on after Ctrl-C or a crash
  python -m training copy --help                                 all settings

A run directory holds settings.toml, the checkpoints last.pt and best.pt, metrics.jsonl and tensorboard/.\
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    console = Console(stderr=True, highlight=False)
    experiments = sorted(path.stem for path in CONFIGS.glob("*.toml"))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(experiments=", ".join(experiments)))
        return 0 if arguments else 2
    experiment, *overrides = arguments
    prog = f"python -m training {experiment}"
    command = shlex.join(["python", "-m", "training", *arguments])
    try:
        if experiment not in experiments:
            raise SettingsError(f"unknown experiment {experiment!r}: there are {', '.join(experiments)}")
        resume = "--resume" in overrides
        if resume:
            overrides.remove("--resume")
        settings = read_settings(CONFIGS / f"{experiment}.toml", overrides, prog)
        if resume:
            settings = _settings_to_resume(settings.run_dir, overrides, prog)
        signal_number = train(settings, command, resume=resume, console=console)
    except TrainingError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    if signal_number is not None:
        resuming = shlex.join(
            ["python", "-m", "training", experiment, "--run-dir", str(settings.run_dir), "--resume"]
        )
        console.print(f"saved; go on with: {resuming}", markup=False, soft_wrap=True)
        return 128 + signal_number
    console.print(f"done; the model is in {settings.run_dir}", markup=False, soft_wrap=True)
    return 0


def _settings_to_resume(run_dir: Path, overrides: Sequence[str], prog: str) -> Settings:
    """The settings that the run in a directory was started with; only how far it goes may be changed."""
    last = checkpoint.load(run_dir / LAST)
    values = last.settings | {"run_dir": str(run_dir)}
    started_with = resolve(values, run_dir / LAST, [], prog)
    wanted = resolve(values, run_dir / LAST, overrides, prog)
    if wanted != started_with.model_copy(update={"num_updates": wanted.num_updates}):
        raise SettingsError(
            f"the run in {run_dir} is resumed with the settings it was started with: "
            "leave out all but --run-dir and --num-updates"
        )
    if wanted.num_updates < last.update:
        raise SettingsError(
            f"num_updates {wanted.num_updates} is less than the {last.update} updates that the run has made"
        )
    return wanted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
