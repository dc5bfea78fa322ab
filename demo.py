"""`make demo`: a trained NTM recalls random sequences through the gRPC server. No torch needed.

It starts the server on the shipped models, sends sequences of the longest length seen in training and of one five
times as long, and to a machine whose memory has 1024 rows ones of fifty times that length. It draws what came back and
where the heads looked, and stops the server. `python demo.py HOST:PORT` asks
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

from ntm import Client, Tls, Trace

# By length. `copy-long` is a machine trained like `copy`, over a memory of 1024 rows in place of 128.
MODELS = {20: "copy", 100: "copy", 1000: "copy-long"}
NUM_BITS = 8
NUM_SEQUENCES = 10
STEPS_IN_A_MESSAGE = 512
PICTURE = Path("out/demo.png")
MOST_LINES = 5
"""Of a sequence drawn in the terminal."""

Bits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recall:
    """What became of some random sequences of one length."""

    model: str
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
        outputs: Bits = self.trace.outputs[self.length + 1 :]
        return outputs

    def weighting(self, name: str) -> npt.NDArray[np.float32]:
        """[N, 2 length + 1]: where the first head of a kind looked at each step."""
        return self.trace.state[name][:, 0, :].T


def main() -> int:
    """Run the demonstration; returns 0 when every bit was recalled."""
    parser = argparse.ArgumentParser(description="A trained NTM recalls random sequences through the server.")
    parser.add_argument(
        "address", nargs="?", help="HOST:PORT of a running server; without it, one is started"
    )
    parser.add_argument(
        "--authority", type=Path, help="PEM file of the authority of that server's certificate"
    )
    parser.add_argument("--token-file", type=Path, help="file with the token that this server asks for")
    arguments = parser.parse_args()
    given: str | None = arguments.address
    tls = Tls(arguments.authority) if arguments.authority else False
    token = arguments.token_file.read_text().strip() if arguments.token_file else None
    console = Console(highlight=False, soft_wrap=True)
    with (
        nullcontext(given) if given else server() as address,
        Client(address, tls=tls, token=token) as client,
    ):
        console.print(f"[bold]Server[/] on {address}: {where_it_runs(client)}\n")
        recalls = [recall(client, model, length) for length, model in MODELS.items()]
    for each in recalls:
        draw(console, each)
    if not given:
        draw_picture(recalls, PICTURE)

    table = Table("model", "length", "sequences", "bits", "bit errors", "steps/s through gRPC")
    for each in recalls:
        num_bits = NUM_SEQUENCES * each.length * NUM_BITS
        row = (each.model, each.length, NUM_SEQUENCES, num_bits, each.bit_errors, f"{each.steps_per_s:,.0f}")
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
    process = subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True)  # nosec B603  # the server
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
    """Where the models run, in words."""
    execution = client.model(MODELS[20]).execution
    return f"{execution.provider}, ONNX Runtime {execution.onnxruntime_version}"


def recall(client: Client, model: str, length: int) -> Recall:
    """Have random sequences recalled, all together, and the first once more step by step."""
    generator = np.random.default_rng()
    targets = generator.integers(0, 2, (NUM_SEQUENCES, length, NUM_BITS)).astype(np.float32)
    inputs = np.stack([copy_inputs(target) for target in targets])
    sessions = [client.session(model) for _ in targets]
    start_s = perf_counter()
    outputs = []
    for first in range(0, inputs.shape[1], STEPS_IN_A_MESSAGE):
        result = client.batch_step(sessions, inputs[:, first : first + STEPS_IN_A_MESSAGE])
        if result.errors:
            raise result.errors.popitem()[1]
        outputs.append(result.outputs)
    elapsed_s = perf_counter() - start_s
    for session in sessions:
        session.delete()
    recalled = np.concatenate(outputs, axis=1)[:, length + 1 :] > 0.5
    with client.session(model) as session:
        trace = session.trace(inputs[0], ["read_weightings", "write_weightings"])
    bit_errors = int((recalled != (targets > 0.5)).sum())
    num_steps = inputs.shape[0] * inputs.shape[1]
    return Recall(model, length, bit_errors, num_steps / elapsed_s, targets[0], trace)


def copy_inputs(target: Bits) -> Bits:
    """The copy task's inputs [2 length + 1, 9]: the sequence, the delimiter on its own channel, then silence."""
    inputs = np.zeros((2 * len(target) + 1, NUM_BITS + 1), np.float32)
    inputs[: len(target), :NUM_BITS] = target
    inputs[len(target), NUM_BITS] = 1
    return inputs


def draw(console: Console, each: Recall) -> None:
    """Draw target and output as bits, wrong ones in red, the beginning alone of a long sequence, and for short ones
    the heads' attention."""
    wrong = (each.output > 0.5) != (each.target > 0.5)
    width = max(20, min(each.length, console.width - 10))
    shown = each.length if each.length <= MOST_LINES * width else width
    part_of = "" if shown == each.length else f", its first {shown} vectors"
    console.print(f"[bold]Length {each.length}[/], one of {NUM_SEQUENCES} sequences{part_of}")
    for start in range(0, shown, width):
        part = slice(start, min(start + width, shown))
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

    figure = Figure(figsize=(17, 7.5), layout="constrained")
    grid = figure.subplots(
        4, len(recalls), width_ratios=[1, 2, 2], height_ratios=[1, 1, 2.2, 2.2], squeeze=False
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
            height, width = values.shape
            axes.imshow(
                shrunk(values) if "eight" in name else values,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                aspect="auto",
                interpolation="nearest",
                cmap=colours,
                vmin=0,
                vmax=1,
            )
            axes.axvline(each.length, color="tab:red", linewidth=1)
            axes.tick_params(labelbottom=axes is column[-1])
            if each is recalls[0]:
                axes.set_ylabel(f"{name}\n(memory row)" if "eight" in name else f"{name}\n(bit)")
        column[0].set_title(
            f"Length {each.length}: {each.bit_errors} wrong bits in {NUM_SEQUENCES} sequences"
        )
        column[-1].set_xlabel("Step; the red line is the delimiter")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def shrunk(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weightings as a picture of no more than 400 by 400 points.

    Each is the brightest of those that it stands for: else a thin line would be lost between them.
    """
    for axis in (0, 1):
        each = -(-values.shape[axis] // 400)
        missing = [(0, -length % each if at == axis else 0) for at, length in enumerate(values.shape)]
        padded = np.pad(values, missing, constant_values=0)
        shape = (-1, each, padded.shape[1]) if axis == 0 else (padded.shape[0], -1, each)
        values = padded.reshape(shape).max(axis=axis + 1)
    return values


if __name__ == "__main__":
    sys.exit(main())
