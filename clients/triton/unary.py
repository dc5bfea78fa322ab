"""Sequences by unary calls of Triton's own client, for any server of its protocol that has the model `copy`.

    python unary.py 127.0.0.1:50051

It prints, as JSON, what each sequence gave: two that take turns, one of a string id, one that begins anew without END,
and one of a single step.
"""

import json
import sys

import numpy as np
import tritonclient.grpc as triton


def vectors(seed: int, num_steps: int) -> np.ndarray:
    """[steps, 9] random bits."""
    return np.random.default_rng(seed).integers(0, 2, (num_steps, 9)).astype(np.float32)


def main(address: str) -> None:
    """Run the sequences on a server, and print what they gave."""
    client = triton.InferenceServerClient(address)

    def step(
        sequence_id: int | str, vector: np.ndarray, start: bool = False, end: bool = False
    ) -> list[float]:
        tensor = triton.InferInput("input", [1, 9], "FP32")
        tensor.set_data_from_numpy(vector[None])
        result = client.infer(
            "copy", [tensor], sequence_id=sequence_id, sequence_start=start, sequence_end=end
        )
        return result.as_numpy("output")[0].tolist()

    told: dict[str, list[list[float]]] = {"101": [], "102": [], "a name": [], "103": [], "104": []}
    for i in range(8):
        for sequence_id in (101, 102):
            vector = vectors(sequence_id, 8)[i]
            told[str(sequence_id)].append(step(sequence_id, vector, start=i == 0, end=i == 7))
    for i, vector in enumerate(vectors(1, 6)):
        told["a name"].append(step("a name", vector, start=i == 0, end=i == 5))
    for i, vector in enumerate(vectors(103, 6)):
        told["103"].append(step(103, vector, start=i in (0, 3), end=i == 5))
    told["104"].append(step(104, vectors(104, 1)[0], start=True, end=True))
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
