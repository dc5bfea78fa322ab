"""Sequences that take turns on one stream of Triton's own client, for any server that has the model `copy`.

    python stream.py 127.0.0.1:50051

All steps are sent before an answer is waited for. It prints, as JSON, what each sequence gave.
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton

NUM_STEPS = 12


def vectors(seed: int, num_steps: int) -> np.ndarray:
    """[steps, 9] random bits."""
    return np.random.default_rng(seed).integers(0, 2, (num_steps, 9)).astype(np.float32)


def main(address: str) -> None:
    """Run the sequences on a server, and print what they gave."""
    client = triton.InferenceServerClient(address)
    answers: queue.Queue[tuple[triton.InferResult | None, Exception | None]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    ids: list[int | str] = [301, 302, 303, "streamed 1", "streamed 2"]
    for i in range(NUM_STEPS):
        for seed, sequence_id in enumerate(ids):
            tensor = triton.InferInput("input", [1, 9], "FP32")
            tensor.set_data_from_numpy(vectors(seed, NUM_STEPS)[i : i + 1])
            client.async_stream_infer(
                "copy",
                [tensor],
                request_id=f"{sequence_id}#{i}",
                sequence_id=sequence_id,
                sequence_start=i == 0,
                sequence_end=i == NUM_STEPS - 1,
            )
    told: dict[str, list[list[float]]] = {str(sequence_id): [] for sequence_id in ids}
    for _ in range(NUM_STEPS * len(ids)):
        result, error = answers.get(timeout=30)
        if result is None:
            raise SystemExit(str(error))
        sequence_id, _, number = result.get_response().id.partition("#")
        assert int(number) == len(told[sequence_id]), "a sequence's answers come in its order"
        told[sequence_id].append(result.as_numpy("output")[0].tolist())
    client.stop_stream()
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
