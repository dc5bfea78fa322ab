"""`python -m server describe FILE`: draft the spec of a model file, prove it, and publish both.

With `--from-triton config.pbtxt` it begins from what the directory of a Triton model says.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
from google.protobuf import json_format

from server import triton_config
from server.errors import ModelFileError
from server.model import spec
from server.model.describe import SESSION, Draft, Hints, draft, input_names, table
from server.model.repository import MODEL_FILE_NAME, NAME_PATTERN, VERSION_PATTERN
from server.runtime import provider
from server.runtime.probe import load_runner
from server.runtime.proof import prove

_MAX_BATCH_SIZE = 64


def describe(arguments: Sequence[str]) -> int:
    """Print a table of a file and its drafted spec; returns the exit status: 0, or 1 where something has to be told."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if flags.file is None and flags.from_triton is None:
        parser.error("name the ONNX file, or a Triton model's config: --from-triton CONFIG")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        given, name, carried, left = Hints(), flags.name or "", list[str](), list[str]()
        if flags.from_triton:
            triton = triton_config.read(flags.from_triton, flags.file)
            flags.file, given, name = triton.file, triton.hints, name or triton.name
            carried, left = triton.carried, triton.left
        found = draft(flags.file, _merged(given, _hints(flags)), name)
        _print(found)
        _print_list("carried over from Triton's config", carried)
        _print_list("not carried over", left)
        if found.missing:
            return 1
        with tempfile.TemporaryDirectory() as scratch:
            proven = _prove(flags.file, found, Path(scratch) / "model" / "1", flags.row_by_row)
        print("\n".join(["", *proven]))
        if flags.publish:
            _publish(flags.file, found, flags.publish)
            print(f"\npublished: {flags.publish / MODEL_FILE_NAME}, with its spec beside it")
        else:
            print("\nits spec, for a model_spec.json beside it, which --publish models/NAME/1 writes:")
            print(json_format.MessageToJson(found.spec))
    except ModelFileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server describe",
        description="Draft the spec of an ONNX step model: what goes in and out of a step, and what is its state.",
        epilog="docs/bring-your-own-model.md goes through it with examples.",
    )
    parser.add_argument(
        "file", type=Path, nargs="?", help="the ONNX file; with --from-triton by default the newest beside it"
    )
    parser.add_argument(
        "--from-triton", type=Path, metavar="CONFIG", help="the config.pbtxt of a Triton model to begin from"
    )
    parser.add_argument("--name", help="the model's name; by default that of the file")
    for flag, metavar, text in (
        ("axis", "INPUT[.AXIS]=LENGTH", "how long an open axis is; without AXIS, the last open one"),
        ("state", "INPUT=OUTPUT", "the output that is an input's value in the next step"),
        ("constant", "INPUT=VALUE", "the value of an input that never changes; several with commas"),
        ("initial", "STATE=VALUE", "what a state begins from: zeros, ones, a number, or a .npy file"),
        ("input", "INPUT[:session]", "an input of a step, or one that a session is given when it is created"),
        ("output", "OUTPUT", "an output that callers get; the others are dropped"),
    ):
        parser.add_argument(
            f"--{flag}", metavar=metavar, action="append", default=[], help=f"{text}; can be repeated"
        )
    parser.add_argument(
        "--row-by-row",
        action="store_true",
        help="run the rows of a batch one after another even where they could be run together: for single callers of a "
        "model whose batches would be padded",
    )
    parser.add_argument(
        "--publish",
        type=_directory,
        metavar="models/NAME/VERSION",
        help="write the model and its spec there once proven",
    )
    return parser


def _directory(text: str) -> Path:
    path = Path(text)
    if not (VERSION_PATTERN.fullmatch(path.name) and NAME_PATTERN.fullmatch(path.parent.name)):
        raise argparse.ArgumentTypeError(f"{text!r} is not laid out NAME/VERSION, such as models/mine/1")
    return path


def _hints(flags: argparse.Namespace) -> Hints:
    axes: dict[str, dict[int, int]] = {}
    for text in flags.axis:
        name, _, length = text.rpartition("=")
        base, _, axis = name.rpartition(".")
        if not (name and length.isdigit()):
            raise ModelFileError(str(flags.file), [f"--axis {text}: say INPUT=LENGTH or INPUT.AXIS=LENGTH"])
        # A tensor's own name may end in a number.
        has_axis = bool(base) and axis.isdigit() and name not in input_names(flags.file)
        axes.setdefault(base if has_axis else name, {})[int(axis) if has_axis else -1] = int(length)
    inputs = dict(
        text.rpartition(":")[::2] if text.endswith(f":{SESSION}") else (text, "step") for text in flags.input
    )
    return Hints(
        axes=axes,
        states=_assignments(flags.file, "state", flags.state),
        constants=_assignments(flags.file, "constant", flags.constant),
        initial=_assignments(flags.file, "initial", flags.initial),
        inputs=inputs,
        outputs=flags.output,
        row_by_row=flags.row_by_row,
    )


def _merged(given: Hints, told: Hints) -> Hints:
    """Hints, of which those that were told go before those that were given."""
    return Hints(
        axes={
            name: {**given.axes.get(name, {}), **told.axes.get(name, {})}
            for name in {**given.axes, **told.axes}
        },
        states={**given.states, **told.states},
        constants={**given.constants, **told.constants},
        initial={**given.initial, **told.initial},
        inputs={name: kind for name, kind in given.inputs.items() if name not in told.constants}
        | {**told.inputs},
        outputs=told.outputs or given.outputs,
        row_by_row=told.row_by_row,
    )


def _assignments(file: Path, flag: str, texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if not all(text.partition("=")):
            raise ModelFileError(str(file), [f"--{flag} {text}: say NAME=VALUE"])
    return dict(text.partition("=")[::2] for text in texts)


def _print(found: Draft) -> None:
    print("\n".join(table([("", "name", "type", "taken for"), *found.rows])))
    for title, lines in (("sure", found.sure), ("guessed", found.guessed), ("has to be told", found.missing)):
        _print_list(title, lines)


def _print_list(title: str, lines: Sequence[str]) -> None:
    if lines:
        print("\n".join(["", f"{title}:", *(f"  - {line}" for line in lines)]))


def _prove(file: Path, found: Draft, directory: Path, told_so: bool) -> list[str]:
    """Load it as the server would and hold its steps against a plain loop; returns what to say of it.

    Args:
        file: the model.
        found: its spec.
        directory: to put both in.
        told_so: whether rows are run one after another since that was asked for.
    """
    _write(file, found, directory)
    model = spec.load(directory / MODEL_FILE_NAME, found.spec.name or file.stem, 1)
    runner = load_runner(model, provider.choose("cpu", 0), _MAX_BATCH_SIZE, _MAX_BATCH_SIZE)
    proof = prove(runner)
    times = runner.turn_times_s
    runner.close()
    why = ""
    if runner.row_by_row:
        why = "" if told_so else " (the graph takes one session at a time)"
    elif runner.padded_batch_size:
        why = " (bits depend on the batch's size: a single step costs as much as a full batch)"
    exactly = (
        "bit for bit"
        if not proof.largest_difference
        else f"within {proof.largest_difference:.0e} of its largest value"
    )
    return [
        f"proven: {proof.num_steps} random steps give what a plain loop of ONNX Runtime gives, {exactly};",
        f"  batches of {', '.join(map(str, proof.batch_sizes))} give what their rows give alone, bit for bit",
        f"rows are run {runner.rows_are_run}{why}"
        + "".join(f"; a step of {size} takes {time_s * 1e3:.3g} ms" for size, time_s in times.items()),
    ]


def _publish(file: Path, found: Draft, directory: Path) -> None:
    """Put the model where a server looks, in one move: a server that looks meanwhile sees all of it or nothing."""
    if directory.exists():
        raise ModelFileError(str(directory), ["it exists: a version never changes, so publish the next one"])
    directory.parent.mkdir(parents=True, exist_ok=True)
    hidden = directory.parent / f".{directory.name}.{os.getpid()}"
    try:
        _write(file, found, hidden)
        hidden.rename(directory)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write(file: Path, found: Draft, directory: Path) -> None:
    directory.mkdir(parents=True)
    shutil.copyfile(file, directory / MODEL_FILE_NAME)
    (directory / spec.SIDECAR_NAME).write_text(json_format.MessageToJson(found.spec))
