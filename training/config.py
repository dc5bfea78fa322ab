"""Settings: everything a run can be told, each with its default and its unit.

They come from an experiment's TOML in `configs/` and from the command line, which wins. They are read once,
in `__main__.py`, and passed down; `loop.py` writes the resolved ones beside its results.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import tomli_w
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from training.errors import SettingsError
from training.model import Cell, DNCCell, NTMCell, PlainCell
from training.model.cell import InitialAttention, InitialMemory
from training.model.controller import ControllerKind
from training.model.dnc.heads import Improvements
from training.tasks import TASKS, Size, Task
from training.tasks.lookup import task_class

CONFIGS = Path(__file__).parent / "configs"
_CONTROLLER = {"controller", "controller_size", "controller_layers", "controller_scale", "forget_bias"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSettings(_Section):
    """The machine."""

    architecture: Literal["ntm", "dnc", "plain"] = "ntm"
    """"ntm", "dnc" (Differentiable Neural Computer), or "plain": the controller alone, without memory and heads, as a
    baseline."""
    memory_rows: int = Field(default=128, ge=1)
    """Rows of the memory, N. A multiple of 4 keeps the exported model's batches exact."""
    row_width: int = Field(default=20, ge=1)
    """Numbers in a row, M."""
    controller: ControllerKind = "lstm"
    """Which network decides: "lstm", "gru", "mgu" (minimal gated unit) or "feedforward"."""
    controller_size: int = Field(default=100, ge=1)
    """Units in a layer of the controller."""
    controller_layers: int = Field(default=1, ge=1, le=100)
    """Layers of the controller, each fed by the one below."""
    controller_scale: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Recurrent weights start even in ± this over √(inputs + units)."""
    forget_bias: float = Field(default=0.0, allow_inf_nan=False)
    """Of an LSTM's forget gates at the start; less than 0 lets it forget soon, and leaves remembering to the memory."""
    num_read_heads: int = Field(default=1, ge=1, le=1000)
    """Read heads."""
    num_write_heads: int = Field(default=1, ge=1, le=1000)
    """Write heads."""
    shift_reach: int = Field(default=1, ge=0, le=1000)
    """How far a head can move its attention in one step, in rows."""
    initial_memory: InitialMemory = "constant"
    """What a sequence finds in the memory: "constant", "learned", or "random" (drawn once for the model)."""
    initial_attention: InitialAttention = "constant"
    """Where the heads are at the start of a sequence, and what they have read: "constant" or "learned"."""
    masked_lookup: bool = True
    """Of a dnc: a lookup by content says which columns count."""
    deallocation: bool = True
    """Of a dnc: a row that is freed is cleared as well."""
    sharp_links: bool = True
    """Of a dnc: a read head can sharpen where the links lead."""

    @model_validator(mode="after")
    def _shifts_fit_the_memory(self) -> ModelSettings:
        if 2 * self.shift_reach + 1 > self.memory_rows:
            raise ValueError(
                f"shift_reach {self.shift_reach} needs memory_rows of at least {2 * self.shift_reach + 1}, "
                f"not {self.memory_rows}"
            )
        return self

    @model_validator(mode="after")
    def _a_dnc_starts_empty_and_has_one_write_head(self) -> ModelSettings:
        if self.architecture == "dnc":
            only = {"num_write_heads": 1, "initial_memory": "constant", "initial_attention": "constant"}
            for name, value in only.items():
                if getattr(self, name) != value:
                    raise ValueError(f"architecture dnc needs {name} {value}, not {getattr(self, name)}")
        return self

    @model_validator(mode="after")
    def _something_carries_over(self) -> ModelSettings:
        if self.architecture == "plain" and self.controller == "feedforward":
            raise ValueError("architecture plain needs a controller that remembers: lstm, gru or mgu")
        return self


class OptimizerSettings(_Section):
    """How weights follow gradients."""

    name: Literal["rmsprop", "graves-rmsprop", "adam"] = "rmsprop"
    """"rmsprop" with momentum, "graves-rmsprop" (the same, centred, as in the paper), or "adam"."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Step size at the start."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates over which the step size grows to that, at the start and wherever the run begins again."""
    schedule: Literal["settle", "linear", "cosine"] = "settle"
    """What becomes of the step size: "settle" changes it once, when an evaluation finds the task as good as solved;
    "linear" lets it fall to 0 over the run, "cosine" too, along half a cosine."""
    settle_below: float | None = Field(default=None, gt=0)
    """The score, of the kind that the task's goal is about, below which that is. Not set: the goal itself."""
    settled_learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Step size from then on, small, for the model to settle on a solution that holds at greater sizes."""
    square_decay: float = Field(default=0.95, ge=0, lt=1)
    """How much of the running mean of squared gradients an update keeps."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """How much of the last step (of the mean gradient, with Adam) an update keeps."""
    epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the mean square, so that steps vanish where gradients are much smaller."""
    clip_norm: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Gradients of a greater norm, over all weights, are scaled down to it."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How much of each weight is added to its gradient, after clipping: what the task has no use for fades away."""
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    """The model that is evaluated and exported is a running mean of the weights; how much of it an update keeps. 0: the
    weights themselves."""


class CurriculumSettings(_Section):
    """Sizes of training that grow with what is mastered."""

    first_sizes: int | None = Field(default=None, ge=1)
    """How many of the task's sizes, from the smallest on, training begins with. Not set: with all of them."""
    add_sizes: int = Field(default=1, ge=1)
    """How many are added when an evaluation finds that the largest of them is mastered."""
    mastered_below: float | None = Field(default=None, gt=0)
    """The score, of the kind that the task's goal is about, below which that is. Not set: the goal itself."""


class EvaluationSettings(_Section):
    """How the model is judged on the way."""

    every_updates: int = Field(default=200, ge=1)
    """Updates between evaluations."""
    num_sequences: int = Field(default=16, ge=1)
    """Sequences of each size of training."""
    num_long_sequences: int = Field(default=64, ge=1)
    """Sequences of each greater size: errors are rare there, and few sequences miss them."""
    long_sizes: tuple[str, ...] = ()
    """Sizes beyond training, such as 120 or 20x10, at which to measure whether the model generalises; it is kept where
    it does best."""
    long_memory_rows: tuple[int, ...] = ()
    """Rows of the memory at those sizes, one number for each size or one for all, for a model that is to be used with
    other rows than it is trained with. None: as many as in training."""
    enough: float | None = Field(default=None, ge=0)
    """The run ends early once the score by which models are kept is no more than this. Not set: it does not."""

    @field_validator("long_sizes", mode="before")
    @classmethod
    def _numbers_are_sizes(cls, values: object) -> object:
        if isinstance(values, int | str):
            values = [values]
        return [str(value) for value in values] if isinstance(values, list | tuple) else values


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

    run_dir: Path
    """Folder that receives checkpoints and records."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Where all randomness of the run starts: weights and sequences."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences in an update, for each process."""
    mix_sizes: bool = False
    """Each sequence of a batch has a size of its own, and shorter ones are padded behind their end, where nothing
    counts; else all of a batch have one size, and nothing is padded."""
    num_updates: int = Field(default=2000, ge=1)
    """Updates in the run."""
    checkpoint_every_updates: int = Field(default=100, ge=1)
    """Updates between checkpoints; a killed run loses at most this many."""
    restart_every_updates: int | None = Field(default=None, ge=1)
    """Updates after which the run begins again with other weights, keeping its best model, unless that is enough; see
    `evaluation.enough`. A multiple of `evaluation.every_updates`. Not set: it never does."""
    settled_memory_rows: tuple[int, ...] = ()
    """Once the task is solved, each update is made over one of these numbers of memory rows, at random, so that a model
    which looks rows up learns to do so among more of them. None: always over those of the model."""
    cpu_minutes: float | None = Field(default=None, gt=0)
    """The run ends, and can be resumed, once its process has used this much processor time. Not set: no limit."""
    num_threads: int = Field(default=1, ge=1)
    """Processor cores that a process uses."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute. On "cpu" in full precision the memory is accessed by a compiled kernel."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Of the arithmetic: all in float32, or matrix products in bfloat16 and the memory in float32."""
    loggers: tuple[str, ...] = ()
    """Where records go beside the run directory: "wandb", or import paths module:name of Lightning Fabric loggers, or
    of what makes one of the run directory."""
    init_from: Path | None = None
    """A run whose best model the weights start from, or a checkpoint file of one. Not set: they are drawn."""
    task: Task
    """What to learn."""
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
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

    @model_validator(mode="after")
    def _long_sizes_are_the_tasks(self) -> Settings:
        parsed = self.long_sizes
        assert len(parsed) == len(self.evaluation.long_sizes)
        return self

    @model_validator(mode="after")
    def _rows_can_be_others(self) -> Settings:
        model, num_sizes = self.model, len(self.evaluation.long_sizes)
        long_rows = self.evaluation.long_memory_rows
        if len(long_rows) not in (0, 1, num_sizes):
            raise ValueError(
                f"evaluation.long_memory_rows has {len(long_rows)} numbers: give one, or one for each of the "
                f"{num_sizes} evaluation.long_sizes"
            )
        least = 2 * model.shift_reach + 1
        is_one_start = (model.initial_memory, model.initial_attention) == ("constant", "constant")
        has_rows = model.architecture == "dnc" or (model.architecture == "ntm" and is_one_start)
        for name, rows in (
            ("evaluation.long_memory_rows", long_rows),
            ("settled_memory_rows", self.settled_memory_rows),
        ):
            if rows and (min(rows) < least or not has_rows):
                raise ValueError(
                    f"{name} {min(rows)} needs a memory, with initial_memory and initial_attention constant, and at "
                    f"least {least} rows for its shifts"
                )
        return self

    @model_validator(mode="after")
    def _a_curriculum_has_sizes_to_add(self) -> Settings:
        first = self.curriculum.first_sizes
        if first is not None and first >= len(self.task.sizes()):
            raise ValueError(
                f"curriculum.first_sizes {first} is no less than the {len(self.task.sizes())} sizes of the task: "
                "there are none to add"
            )
        return self

    @model_validator(mode="after")
    def _a_model_is_judged_before_it_is_dropped(self) -> Settings:
        restart, evaluation = self.restart_every_updates, self.evaluation
        if restart is not None and (restart % evaluation.every_updates or evaluation.enough is None):
            raise ValueError(
                f"restart_every_updates {restart} needs evaluation.enough, and must be a multiple of "
                f"evaluation.every_updates {evaluation.every_updates}"
            )
        return self

    @property
    def long_memory_rows(self) -> list[int | None]:
        """Rows of the memory at each of the sizes beyond training; None where they are those of training."""
        rows, num_sizes = self.evaluation.long_memory_rows, len(self.evaluation.long_sizes)
        return list(rows) if len(rows) == num_sizes else [*(rows or [None])] * num_sizes

    @property
    def long_sizes(self) -> list[Size]:
        """Sizes beyond training."""
        try:
            return parse_sizes(self.evaluation.long_sizes, self.task, "evaluation.long_sizes")
        except SettingsError as error:
            raise ValueError(str(error)) from None


def parse_sizes(texts: Sequence[str], task: Task, where: str) -> list[Size]:
    """Sizes of a task from what one types, such as 120 or 20x10.

    Raises:
        SettingsError: one of them is not a size of the task; it says `where` it was found.
    """
    for text in texts:
        if not re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6})*", text) or text.count("x") + 1 != len(
            task.size_names
        ):
            names = " x ".join(task.size_names)
            example = size_text(max(task.sizes()))
            raise SettingsError(f"{where}: {text!r} is not a size of {task.name}: {names}, such as {example}")
    sizes = [tuple(map(int, text.split("x"))) for text in texts]
    for text, size in zip(texts, sizes, strict=True):
        try:
            task.check_size(size)
        except ValueError as error:
            raise SettingsError(f"{where}: {text!r} is not a size of {task.name}: {error}") from None
    return sizes


def size_text(size: Size) -> str:
    """A size as one types it, such as 20x10."""
    return "x".join(map(str, size))


@functools.cache
def settings_class(task: str) -> type[Settings]:
    """The settings of a run of one task: only those that the task has can be given.

    Raises:
        SettingsError: there is no such task.
    """
    own = task_class(task)
    # --help shows the defaults of a task that has one for each setting.
    is_complete = not any(field.is_required() for field in own.model_fields.values())
    default: Any = own.model_construct() if is_complete else ...
    return create_model("Settings", __base__=Settings, __doc__=Settings.__doc__, task=(own, default))


def experiments() -> list[str]:
    """The names of the experiments in this tree."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def read_experiment(experiment: str, arguments: Sequence[str], prog: str) -> Settings:
    """The settings of an experiment with those of the command line over them.

    Args:
        experiment: one of `experiments`, a TOML file of one's own, or the import path module:Class of a task, whose
            settings then have their defaults.
        arguments: of the command line.
        prog: what was typed before them, for messages.

    Raises:
        SettingsError: there is no such experiment, or a setting is unknown, malformed or cannot work.
    """
    if experiment in experiments():
        return read_settings(CONFIGS / f"{experiment}.toml", arguments, prog)
    if experiment.endswith(".toml"):
        return read_settings(Path(experiment), arguments, prog)
    if ":" in experiment:
        values = {"task": {"name": experiment}, "run_dir": f"runs/{experiment.rpartition(':')[2]}"}
        return resolve(values, Path(experiment), arguments, prog)
    raise SettingsError(
        f"unknown experiment {experiment!r}: there are {', '.join(experiments())}; of your own, give a file that ends "
        "in .toml, or the import path module:Class of a task"
    )


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
    settings = settings_class(_task_name(values, source))
    command_line: CliSettingsSource[Any] = CliSettingsSource(
        settings, root_parser=parser, cli_parse_args=list(arguments)
    )
    try:
        # The type checker sees the fields, and not what BaseSettings itself takes.
        return settings(_cli_settings_source=command_line, **values)  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError(_sentence(error, source, settings)) from None


def _task_name(values: dict[str, Any], source: Path) -> str:
    task = values.get("task")
    if not isinstance(task, dict) or not isinstance(task.get("name"), str):
        raise SettingsError(
            f"{source} names no task: it needs [task] with name = one of {', '.join(TASKS)}, "
            "or an import path module:Class"
        )
    return str(task["name"])


def write_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as a TOML that `read_settings` takes."""
    path.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))


def make_cell(settings: Settings) -> Cell:
    """The cell that the settings describe, with fresh weights."""
    task, model = settings.task, settings.model
    with torch.device(
        "cpu"
    ):  # A task may read its data for them, also where the cell is made of shapes alone.
        sizes: dict[str, Any] = {"input_size": task.input_size, "output_size": task.output_size}
    if model.architecture == "plain":
        return PlainCell(**sizes, **model.model_dump(include=_CONTROLLER))
    if model.architecture == "dnc":
        improvements = Improvements(**model.model_dump(include=set(Improvements._fields)))
        memory = {"memory_rows", "row_width", "num_read_heads"}
        return DNCCell(**sizes, **model.model_dump(include=_CONTROLLER | memory), improvements=improvements)
    return NTMCell(**sizes, **model.model_dump(exclude={"architecture", *Improvements._fields}))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def _kebab(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _sentence(error: ValidationError, toml: Path, settings: type[Settings]) -> str:
    problems = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, _names(settings), n=1, cutoff=0.5)
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
