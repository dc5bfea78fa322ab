"""How fast training is: forward, backward and optimiser step on copy, beside the implementations people use.

    python -m benchmarks.training_speed --pytorch-ntm ../pytorch-ntm --ntm-pytorch ../ntm-pytorch

The peers are checkouts that the reader makes (`peers/trainers.py` says how); without them only this project is
measured. Sizes are equal everywhere: memory 128 x 20, an LSTM controller of 100 units, one read and one write head,
sequences of 10 vectors, one thread, processor time. The result goes to `results/training_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Case, Figures, machine, ratio, side_by_side
from benchmarks.peers import trainers
from training.model import NTMCell, RecurrentLayer
from training.tasks.copy import CopyTask

RESULT = Path(__file__).parent / "results" / "training_speed.json"
_PEER_BATCHES = {"pytorch-ntm": (1, 16, 32), "ntm-pytorch": (1,)}
_BATCHES = (1, 16, 32, 64, 128)
_LENGTHS = (10, 20, 40, 80)
# What the project promises: how many times the peer's sequences a second at equal batch, and the peer's default, a
# batch of 1, against this project's best batch.
_FLOORS = {1: 5.0, 16: 10.0, 32: 10.0}
_FLOOR_OVER_DEFAULT = 50.0


def update(is_compiled: bool, batch_size: int, length: int) -> Callable[[], None]:
    """One update of the copy recipe, on sequences of one length."""
    torch.manual_seed(0)
    cell = NTMCell(input_size=9, output_size=8, initial_memory="constant", initial_attention="constant")
    layer = RecurrentLayer(cell, use_kernel=is_compiled)
    optimizer = torch.optim.RMSprop(cell.parameters(), lr=1e-3, alpha=0.95, momentum=0.9)
    task, generator = CopyTask(), torch.Generator().manual_seed(0)

    def one() -> None:
        inputs, targets, _ = task.draw(batch_size, (length,), generator)
        outputs, _ = layer(inputs)
        loss = F.binary_cross_entropy_with_logits(outputs[-length:], targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(cell.parameters(), 10)
        optimizer.step()

    return one


def _measure_own(one: Callable[[], None], batch_size: int, duration_s: float) -> dict[str, float]:
    rate = trainers.updates_per_s(one, duration_s)
    return {"sequences_per_s": rate * batch_size, "ms_per_update": 1000 / rate}


def _measure_peer(name: str, checkout: Path, batch_size: int, duration_s: float) -> dict[str, float]:
    # Without -P its own folder comes first, where torch would take `triton.py` for the package of that name.
    program = [
        sys.executable,
        "-P",
        trainers.__file__,
        name,
        str(checkout),
        str(batch_size),
        "10",
        str(duration_s),
    ]
    ended = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # nosec B603  # our own
    rate = float(ended.stdout)
    return {"sequences_per_s": rate * batch_size, "ms_per_update": 1000 / rate}


def main() -> int:
    """Returns the exit code: 1 if a ratio is under its floor."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__)
    for peer in _PEER_BATCHES:
        parser.add_argument(f"--{peer}", type=Path, help=f"checkout of {peer}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    checkouts = {peer: getattr(options, peer.replace("-", "_")) for peer in _PEER_BATCHES}
    checkouts = {peer: path for peer, path in checkouts.items() if path is not None}

    cases: dict[str, Case] = {}
    for batch_size in _BATCHES:
        one = update(True, batch_size, length=10)
        cases[f"this project, batch {batch_size}"] = partial(_measure_own, one, batch_size, options.seconds)
    cases["this project in torch operations, batch 16"] = partial(
        _measure_own, update(False, 16, length=10), 16, options.seconds
    )
    for peer, path in checkouts.items():
        for batch_size in _PEER_BATCHES[peer]:
            cases[f"{peer}, batch {batch_size}"] = partial(
                _measure_peer, peer, path, batch_size, options.seconds
            )
    figures = side_by_side(cases, options.rounds)
    by_length: dict[str, Case] = {
        f"length {length}": partial(_measure_own, update(True, 16, length), 16, options.seconds)
        for length in _LENGTHS
    }
    growth = side_by_side(by_length, options.rounds)

    ratios = _ratios(figures, list(checkouts))
    console.print(_table(figures, "copy, 10 vectors"))
    console.print(_table(growth, "batch 16, by length"))
    for name, (reached, floor) in ratios.items():
        console.print(f"{name}: {reached:.1f} times, at least {floor:g} wanted")
    result = {
        "machine": machine(),
        "rounds": options.rounds,
        "speed": _plain(figures),
        "by_length": _plain(growth),
        "ratios": {name: round(reached, 1) for name, (reached, _) in ratios.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(reached < floor for reached, floor in ratios.values()))


def _ratios(figures: Figures, peers: list[str]) -> dict[str, tuple[float, float]]:
    """By what is compared: how many times the peer, and how many times are promised."""
    ratios = {}
    for peer in peers:
        for batch_size in _PEER_BATCHES[peer]:
            own, other = f"this project, batch {batch_size}", f"{peer}, batch {batch_size}"
            ratios[other] = (ratio(figures, own, other, "sequences_per_s"), _FLOORS[batch_size])
        best = max(_BATCHES, key=lambda b: figures[f"this project, batch {b}"]["sequences_per_s"].median)
        own, other = f"this project, batch {best}", f"{peer}, batch 1"
        ratios[f"{own}, over {peer}'s default"] = (
            ratio(figures, own, other, "sequences_per_s"),
            _FLOOR_OVER_DEFAULT,
        )
    return ratios


def _table(figures: Figures, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "sequences/s", "lowest to highest", "ms an update"):
        table.add_column(column, justify="left" if not column else "right")
    for case, metrics in figures.items():
        rate, took = metrics["sequences_per_s"], metrics["ms_per_update"]
        table.add_row(
            case, f"{rate.median:.1f}", f"{rate.lowest:.1f} - {rate.highest:.1f}", f"{took.median:.1f}"
        )
    return table


def _plain(figures: Figures) -> dict[str, dict[str, dict[str, float]]]:
    return {
        case: {
            metric: {k: round(v, 2) for k, v in asdict(figure).items()} for metric, figure in metrics.items()
        }
        for case, metrics in figures.items()
    }


if __name__ == "__main__":
    sys.exit(main())
