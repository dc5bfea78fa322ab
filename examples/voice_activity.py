"""Voice activity of 64 callers at once, by the model that the package `silero-vad` ships.

    pip install silero-vad
    python -m server describe "$(python examples/voice_activity.py --file)" --name vad \
        --axis input=576 --constant sr=16000 --publish models/vad/1
    python -m server &
    python examples/voice_activity.py

Each caller is a session. Every 32 ms its next 512 samples go to the model, behind the last 64 of those before.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ntm import Client

RATE, FRAME, CONTEXT = 16_000, 512, 64
NUM_CALLERS, NUM_FRAMES = 64, 30


def model_file() -> Path:
    """Where the package has its model; the package itself, which imports torch, is not needed."""
    spec = find_spec("silero_vad")
    if spec is None or spec.origin is None:
        raise SystemExit("silero-vad is not installed: pip install silero-vad")
    return Path(spec.origin).parent / "data" / "silero_vad.onnx"


def frames(sound: np.ndarray) -> np.ndarray:
    """Sound [S, samples] as what the model takes, [S, T, 576]: each frame behind the end of the one before."""
    padded = np.pad(sound, ((0, 0), (CONTEXT, 0)))
    starts = range(0, sound.shape[1], FRAME)
    return np.stack([padded[:, start : start + CONTEXT + FRAME] for start in starts], axis=1)


def calls() -> np.ndarray:
    """Sound of all callers [S, samples]: every other one is silent, the rest hum like a voice."""
    time_s = np.arange(NUM_FRAMES * FRAME) / RATE
    generator = np.random.default_rng(0)
    pitch = generator.uniform(100, 200, (NUM_CALLERS, 1)) * (1 + 0.05 * np.sin(2 * np.pi * 4 * time_s))
    phase = 2 * np.pi * np.cumsum(pitch, axis=1) / RATE
    voice = sum(np.sin(phase * k) / k for k in range(1, 20)) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * time_s))
    is_silent = np.arange(NUM_CALLERS) % 2 == 1
    voice[is_silent] = generator.normal(0, 1e-3, voice[is_silent].shape)
    return (0.2 * voice).astype(np.float32)


def main(address: str) -> np.ndarray:
    """The probability of speech [callers, frames]."""
    sound = frames(calls())
    with Client(address) as client:
        sessions = [client.session("vad") for _ in range(NUM_CALLERS)]
        heard = []
        for frame in range(NUM_FRAMES):  # as they would come in, one every 32 ms
            result = client.batch_step(sessions, sound[:, frame : frame + 1])
            heard.append(result.outputs[:, 0, 0])
        for session in sessions:
            session.delete()
    return np.stack(heard, axis=1)


if __name__ == "__main__":
    if sys.argv[1:] == ["--file"]:
        print(model_file())
    else:
        speech = main(sys.argv[1] if sys.argv[1:] else "127.0.0.1:50051")
        print(
            "mean probability of speech:",
            speech[::2].mean().round(3),
            "of silence:",
            speech[1::2].mean().round(3),
        )
