"""Settings: everything a run can be told, each with its default and its unit.

They come from an experiment's TOML in `configs/` and from the command line, which wins. They are read once,
in `__main__.py`, and passed down; `loop.py` writes the resolved ones beside its results.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from training.errors import SettingsError
from training.model.cell import InitialAttention, InitialMemory, NTMCell
from training.model.controller import ControllerKind
from training.tasks import CopyTask

CONFIGS = Path(__file__).parent / "configs"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSettings(_Section):
    """The machine."""

    memory_rows: int = Field(default=128, ge=1)
    """Rows of the memory, N. A multiple of 4 keeps the exported model's batches exact."""
    row_width: int = Field(default=20, ge=1)
    """Numbers in a row, M."""
    controller: ControllerKind = "lstm"
    """Which network decides: "lstm" or "feedforward"."""
    controller_size: int = Field(default=100, ge=1)
    """Units of the controller."""
    num_read_heads: int = Field(default=1, ge=1)
    """Read heads."""
    num_write_heads: int = Field(default=1, ge=1)
    """Write heads."""
    shift_reach: int = Field(default=1, ge=0)
    """How far a head can move its attention in one step, in rows."""
    initial_memory: InitialMemory = "constant"
    """What a sequence finds in the memory: "constant", "learned", or "random" (drawn once for the model)."""
    initial_attention: InitialAttention = "constant"
    """Where the heads are at the start of a sequence, and what they have read: "constant" or "learned"."""

    @model_validator(mode="after")
    def _shifts_fit_the_memory(self) -> ModelSettings:
        if 2 * self.shift_reach + 1 > self.memory_rows:
            raise ValueError(
                f"shift_reach {self.shift_reach} needs memory_rows of at least {2 * self.shift_reach + 1}, "
                f"not {self.memory_rows}"
            )
        return self


class OptimizerSettings(_Section):
    """RMSprop with momentum, and clipping."""

    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Step size until the task is solved: until an evaluation finds fewer than 0.1 wrong bits in a sequence."""
    settled_learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Step size from then on, small, for the model to settle on a solution that holds at greater lengths."""
    square_decay: float = Field(default=0.95, ge=0, lt=1)
    """How much of the running mean of squared gradients an update keeps."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """How much of the last step an update keeps."""
    clip_norm: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Gradients of a greater norm, over all weights, are scaled down to it."""


class EvaluationSettings(_Section):
    """How the model is judged on the way."""

    every_updates: int = Field(default=200, ge=1)
    """Updates between evaluations."""
    num_sequences: int = Field(default=16, ge=1)
    """Sequences of each length of training."""
    num_long_sequences: int = Field(default=64, ge=1)
    """Sequences of each greater length: errors are rare there, and few sequences miss them."""
    long_lengths: tuple[int, ...] = (40, 80, 120)
    """Lengths beyond training at which to measure whether the model generalises; it is kept where it does best."""

    @model_validator(mode="after")
    def _lengths_are_positive(self) -> EvaluationSettings:
        if any(length < 1 for length in self.long_lengths):
            raise ValueError("long_lengths must all be at least 1")
        return self


class Settings(BaseSettings):
    """Train a Neural Turing Machine. An experiment's TOML goes before the defaults given here.

    --resume goes on from the run directory's last checkpoint, with the settings the run was started with.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    run_dir: Path = Path("runs/copy")
    """Folder that receives checkpoints and records."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Where all randomness of the run starts: weights and sequences."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences in an update."""
    num_updates: int = Field(default=2000, ge=1)
    """Updates in the run."""
    checkpoint_every_updates: int = Field(default=100, ge=1)
    """Updates between checkpoints; a killed run loses at most this many."""
    num_threads: int = Field(default=1, ge=1)
    """Processor cores to use."""
    task: CopyTask = CopyTask()
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """No environment variables: a run is told by its TOML and its command line alone."""
        return (init_settings,)


def read_settings(toml: Path, arguments: Sequence[str], prog: str) -> Settings:
    """The settings of a TOML with those of the command line over them.

    Raises:
        SettingsError: the TOML cannot be read, or a setting is unknown, malformed or cannot work.
    """
    try:
        from_file = tomllib.loads(toml.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the settings in {toml}: {error}") from None
    return resolve(from_file, toml, arguments, prog)


def resolve(values: dict[str, Any], source: Path, arguments: Sequence[str], prog: str) -> Settings:
    """Settings from values that a file `source` held, with those of the command line over them.

    Raises:
        SettingsError: a setting is unknown, malformed or cannot work.
    """
    parser = _Parser(prog=prog, allow_abbrev=False)
    # Both --optimizer.learning-rate and --optimizer.learning_rate are natural to type.
    arguments = [_kebab(argument) for argument in arguments]
    command_line: CliSettingsSource[Any] = CliSettingsSource(
        Settings, root_parser=parser, cli_parse_args=list(arguments)
    )
    try:
        # The type checker sees the fields, and not what BaseSettings itself takes.
        return Settings(_cli_settings_source=command_line, **values)  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError(_sentence(error, source)) from None


def write_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as a TOML that `read_settings` takes."""
    path.write_text(tomli_w.dumps(settings.model_dump(mode="json")))


def make_cell(settings: Settings) -> NTMCell:
    """The cell that the settings describe, with fresh weights."""
    return NTMCell(
        input_size=settings.task.input_size,
        output_size=settings.task.output_size,
        **settings.model.model_dump(),
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def _kebab(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _sentence(error: ValidationError, toml: Path) -> str:
    problems = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, _names(Settings), n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            problems.append(f"unknown setting {name} in {toml}{hint}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {message[0].lower()}{message[1:]}" + _given(problem["input"]))
    return "; ".join(problems)


def _given(value: object) -> str:
    return "" if isinstance(value, dict | BaseModel) else f", not {value!r}"


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _names(field.annotation, f"{prefix}{name}.")
    return names
