"""A recurrent policy driven by a vector of environments, whose episodes end at different steps.

    python examples/recurrent_policy.py --export models/policy/1
    python -m server &
    python examples/recurrent_policy.py

The policy takes an observation and the state h and c of an LSTM, [layers, batch, hidden], as policies exported by RL
libraries do. Each environment is a session. When its episode ends, the next step of that session is reset: one call
steps all environments, whatever their episodes do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ntm import Client

NUM_ENVIRONMENTS, NUM_STEPS, HIDDEN = 16, 60, 32


class Carts:
    """Points on a line that are to be held at 0; an episode ends beyond 1, or after a while."""

    def __init__(self, num_environments: int) -> None:
        self._generator = np.random.default_rng(0)
        self.state = self._generator.uniform(-0.5, 0.5, (num_environments, 2))
        self._age = self._generator.integers(0, 20, num_environments)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observations [S, 2] after actions [S, 1], and which of them begin a new episode [S]."""
        self.state[:, 1] += 0.1 * np.clip(actions[:, 0], -1, 1)
        self.state[:, 0] += 0.1 * self.state[:, 1]
        self._age += 1
        is_over = (np.abs(self.state[:, 0]) > 1) | (self._age > 25)
        self.state[is_over] = self._generator.uniform(-0.5, 0.5, (int(is_over.sum()), 2))
        self._age[is_over] = 0
        return self.state.astype(np.float32), is_over


def export(path: Path) -> None:
    """Write an untrained policy as a model."""
    import torch
    from torch import nn

    from export import export_step

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.actor = nn.LSTM(2, HIDDEN), nn.Linear(HIDDEN, 1)

        def forward(self, inputs: dict, state: dict) -> tuple:
            out, (h, c) = self.memory(inputs["obs"][None], (state["h"], state["c"]))
            return {"actions": self.actor(out[0])}, {"h": h, "c": c}

    torch.manual_seed(0)
    zeros = torch.zeros(1, 1, HIDDEN)
    export_step(
        Policy(),
        inputs={"obs": torch.zeros(1, 2)},
        state={"h": zeros, "c": zeros},
        path=path,
        batch_axes={"h": 1, "c": 1},
    )


def main(address: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations, resets and actions of all environments, [T, S, ...]."""
    carts = Carts(NUM_ENVIRONMENTS)
    observations, resets = carts.state.astype(np.float32), np.ones(NUM_ENVIRONMENTS, np.bool_)
    seen = []
    with Client(address) as client:
        sessions = [client.session("policy") for _ in range(NUM_ENVIRONMENTS)]
        for _ in range(NUM_STEPS):
            result = client.batch_step(sessions, {"obs": observations[:, None]}, resets[:, None])
            actions = result.outputs[:, 0]
            seen.append((observations, resets, actions))
            observations, resets = carts.step(actions)
        for session in sessions:
            session.delete()
    return tuple(np.stack(part) for part in zip(*seen, strict=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--export"]:
        export(Path(sys.argv[2]))
    else:
        _, resets, actions = main(sys.argv[1] if sys.argv[1:] else "127.0.0.1:50051")
        print(f"{actions.size} actions, {int(resets.sum())} episodes")
