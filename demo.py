"""`make demo`: a trained NTM recalls random sequences through the gRPC server. No torch needed.

It starts the server on the shipped model, sends sequences of the longest length seen in training and of one five
times as long, draws what came back and where the heads looked, and stops the server. `python demo.py HOST:PORT` asks
a server that runs already, and needs the client alone: it draws in the terminal only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ntm import Client, Trace

MODEL = "copy"
NUM_BITS = 8
LENGTHS = (20, 100)
NUM_SEQUENCES = 10
PICTURE = Path("out/demo.png")

Bits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recall:
    """What became of some random sequences of one length."""

    length: int
    bit_errors: int
    steps_per_s: float
    target: Bits
    """[length, 8], the first of the sequences."""
    trace: Trace
    """Its recall, over all 2 length + 1 steps."""

    @property
    def output(self) -> Bits:
        """[length, 8] in (0, 1), the recalled part."""
        return self.trace.outputs[self.length + 1 :]

    def weighting(self, name: str) -> npt.NDArray[np.float32]:
        """[N, 2 length + 1]: where the first head of a kind looked at each step."""
        return self.trace.state[name][:, 0, :].T


def main() -> int:
    """Run the demonstration; returns 0 when every bit was recalled."""
    parser = argparse.ArgumentParser(description="A trained NTM recalls random sequences through the server.")
    parser.add_argument(
        "address", nargs="?", help="HOST:PORT of a running server; without it, one is started"
    )
    given: str | None = parser.parse_args().address
    console = Console(highlight=False, soft_wrap=True)
    with nullcontext(given) if given else server() as address, Client(address) as client:
        console.print(f"[bold]Server[/] on {address}, model {MODEL!r}: {where_it_runs(client)}\n")
        recalls = [recall(client, length) for length in LENGTHS]
    for each in recalls:
        draw(console, each)
    if not given:
        draw_picture(recalls, PICTURE)

    table = Table("length", "sequences", "bits", "bit errors", "steps/s through gRPC")
    for each in recalls:
        num_bits = NUM_SEQUENCES * each.length * NUM_BITS
        row = (each.length, NUM_SEQUENCES, num_bits, each.bit_errors, f"{each.steps_per_s:,.0f}")
        table.add_row(*map(str, row))
    console.print(table)
    picture = "" if given else f" Picture: [bold]{PICTURE}[/]"
    console.print(f"Trained on lengths 1 to 20 only.{picture}")
    return 0 if not any(each.bit_errors for each in recalls) else 1


@contextmanager
def server() -> Iterator[str]:
    """The server on the shipped models and a free port; gives its address, and stops it in the end."""
    command = [
        sys.executable,
        "-m",
        "server",
        "--models",
        "models",
        "--store",
        "none",
        "--listen",
        "127.0.0.1:0",
    ]
    process = subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if '"listening"' in line:
                yield json.loads(line)["address"]
                break
        else:
            sys.exit("".join(said) + "the server did not start")
    finally:
        process.terminate()
        process.communicate()


def where_it_runs(client: Client) -> str:
    """Where the model runs, in words."""
    execution = client.model(MODEL).execution
    return f"{execution.provider}, ONNX Runtime {execution.onnxruntime_version}"


def recall(client: Client, length: int) -> Recall:
    """Have random sequences recalled, all in one message, and the first once more step by step."""
    generator = np.random.default_rng()
    targets = generator.integers(0, 2, (NUM_SEQUENCES, length, NUM_BITS)).astype(np.float32)
    inputs = np.stack([copy_inputs(target) for target in targets])
    sessions = [client.session(MODEL) for _ in targets]
    start_s = perf_counter()
    result = client.batch_step(sessions, inputs)
    elapsed_s = perf_counter() - start_s
    for session in sessions:
        session.delete()
    if result.errors:
        raise result.errors.popitem()[1]
    recalled = result.outputs[:, length + 1 :] > 0.5
    with client.session(MODEL) as session:
        trace = session.trace(inputs[0], ["read_weightings", "write_weightings"])
    bit_errors = int((recalled != (targets > 0.5)).sum())
    return Recall(length, bit_errors, inputs.shape[0] * inputs.shape[1] / elapsed_s, targets[0], trace)


def copy_inputs(target: Bits) -> Bits:
    """The copy task's inputs [2 length + 1, 9]: the sequence, the delimiter on its own channel, then silence."""
    inputs = np.zeros((2 * len(target) + 1, NUM_BITS + 1), np.float32)
    inputs[: len(target), :NUM_BITS] = target
    inputs[len(target), NUM_BITS] = 1
    return inputs


def draw(console: Console, each: Recall) -> None:
    """Draw target and output as bits, wrong ones in red, and for short sequences the heads' attention."""
    console.print(f"[bold]Length {each.length}[/], one of {NUM_SEQUENCES} sequences")
    wrong = (each.output > 0.5) != (each.target > 0.5)
    width = max(20, min(each.length, console.width - 10))
    for start in range(0, each.length, width):
        part = slice(start, start + width)
        for name, bits in (("target", each.target), ("output", each.output)):
            for number, line in enumerate(bit_lines(bits[part], wrong[part])):
                console.print(Text(f"{name if number == 0 else '':8}") + line)
            console.print()
    if each.trace.outputs.shape[0] > console.width - 10:
        return
    for name in ("write", "read"):
        # Rows that had most of the attention at some step, in the order they had it.
        weighting = each.weighting(f"{name}_weightings")
        used = np.flatnonzero(weighting.max(axis=1) > 0.5)
        for number, row in enumerate(used[weighting[used].argmax(axis=1).argsort()]):
            shades = "".join(" ░▒▓█"[min(4, int(value * 5))] for value in weighting[row])
            console.print(f"{f'{name}s' if number == 0 else '':8}{shades}  row {row}", style="cyan")
        console.print()


def bit_lines(bits: Bits, wrong: npt.NDArray[np.bool_]) -> Iterator[Text]:
    """Bits [length, 8] as four lines of half blocks, time going right."""
    for top in range(0, NUM_BITS, 2):
        line = Text()
        for step in range(len(bits)):
            upper, lower = bits[step, top] > 0.5, bits[step, top + 1] > 0.5
            is_wrong = wrong[step, top] or wrong[step, top + 1]
            line.append(" ▄▀█"[2 * upper + lower], style="red on dark_red" if is_wrong else "")
        yield line


def draw_picture(recalls: list[Recall], path: Path) -> None:
    """Target, output and attention over time, a column for each length."""
    from matplotlib.figure import Figure  # here, so that asking a running server needs the client alone

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(
        4, len(recalls), width_ratios=[1, 2], height_ratios=[1, 1, 2.2, 2.2], squeeze=False
    )
    for column, each in zip(grid.T, recalls, strict=True):
        lead = np.zeros((each.length + 1, NUM_BITS))
        pictures = [
            ("Target", np.concatenate([lead, each.target]).T, "gray"),
            ("Output", each.trace.outputs.T, "gray"),
            ("Write weighting", each.weighting("write_weightings"), "magma"),
            ("Read weighting", each.weighting("read_weightings"), "magma"),
        ]
        for axes, (name, values, colours) in zip(column, pictures, strict=True):
            axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=1)
            axes.axvline(each.length, color="tab:red", linewidth=1)
            axes.set_ylabel(f"{name}\n(memory row)" if "eight" in name else f"{name}\n(bit)")
            axes.label_outer()
        column[0].set_title(
            f"Length {each.length}: {each.bit_errors} wrong bits in {NUM_SEQUENCES} sequences"
        )
        column[-1].set_xlabel("Step; the red line is the delimiter: the sequence before it, its recall after")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
