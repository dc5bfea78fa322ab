"""A model of two stages, each a file of its own, merged into one graph with `onnx.compose`.

    python examples/two_stages.py --publish models/two-stages/1
    python -m server &
    python examples/two_stages.py

The first stage smooths what comes in, the second counts how often it was above a limit. Each has a state. Merged, one
step of the server runs both, and nothing of what passes between them crosses the wire.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ntm import Client

SMOOTH = """
<ir_version: 8, opset_import: ["" : 17]>
smooth (float[N,4] x, float[N,4] mean) => (float[N,4] smoothed, float[N,4] next_mean)
<float keep = {0.75}, float take = {0.25}>
{
    kept = Mul (mean, keep)
    taken = Mul (x, take)
    next_mean = Add (kept, taken)
    smoothed = Identity (next_mean)
}
"""
COUNT = """
<ir_version: 8, opset_import: ["" : 17]>
count (float[N,4] signal, int64[N,4] times) => (int64[N,4] total, int64[N,4] next_times)
<float limit = {0.5}>
{
    is_above = Greater (signal, limit)
    above = Cast <to = 7> (is_above)
    next_times = Add (times, above)
    total = Identity (next_times)
}
"""


def publish(directory: Path) -> None:
    """Merge the stages and have `describe` find, prove and publish what came of it."""
    import onnx
    from onnx import compose, parser

    merged = compose.merge_models(
        parser.parse_model(SMOOTH), parser.parse_model(COUNT), io_map=[("smoothed", "signal")]
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "two_stages.onnx"
        onnx.save(merged, file)
        command = [sys.executable, "-m", "server", "describe", str(file), "--publish", str(directory)]
        subprocess.run(command, check=True)  # nosec B603  # the server


def main(address: str) -> np.ndarray:
    """How often each channel was above the limit, after every step."""
    inputs = np.random.default_rng(0).uniform(0, 1, (100, 4)).astype(np.float32)
    with Client(address) as client, client.session("two-stages") as session:
        return session.run(inputs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--publish"]:
        publish(Path(sys.argv[2]))
    else:
        print(main(sys.argv[1] if sys.argv[1:] else "127.0.0.1:50051")[-1])
