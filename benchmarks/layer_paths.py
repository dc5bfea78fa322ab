"""Layer paths: the loop of docs/layer.md on the compiled path and on torch's, at greater lengths as well.

Run from the repository: `python -m benchmarks.layer_paths --seeds 5`.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

PAGE = Path(__file__).parent.parent / "docs" / "layer.md"
LENGTHS = (5, 10, 20, 30)


def loop_of_the_page() -> str:
    """The code of the page's training loop."""
    [loop] = [
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "draw(" in code
    ][:1]
    return str(loop)


@torch.no_grad()
def wrong(names: dict[str, Any]) -> str:
    """The share of symbols that are wrong, and their cost in nats, at each length."""
    torch.manual_seed(99)
    shown = []
    for length in LENGTHS:
        symbols, heard = names["draw"](200, length)
        logits = names["model"](symbols)[0][-len(heard) :]
        share = (logits.argmax(-1) != heard).float().mean()
        shown.append(f"{share:.2%} ({cross_entropy(logits.flatten(0, 1), heard.flatten()):.4f})")
    return "  ".join(shown)


def main() -> None:
    """Train by each path with each seed, and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=500)
    options = parser.parse_args()
    print("path, seed, processor seconds, wrong symbols (cost) at lengths", *LENGTHS)
    for seed in range(options.seeds):
        for path, use_kernel in ("compiled", True), ("torch", False):
            loop = loop_of_the_page().replace("manual_seed(0)", f"manual_seed({seed})")
            loop = loop.replace("memory_rows=32", f"memory_rows=32, use_kernel={use_kernel}")
            names: dict[str, Any] = {"NUM_UPDATES": options.updates}
            started = time.process_time()
            exec(compile(loop, str(PAGE), "exec"), names)  # noqa: S102  # nosec B102  # a loop of our own page
            print(path, seed, f"{time.process_time() - started:.0f}", wrong(names), flush=True)


if __name__ == "__main__":
    main()
