"""Sequences that run at once, by Triton's own asyncio client, for any server of its protocol that has the model `copy`.

    python by_asyncio.py 127.0.0.1:50051

It prints, as JSON, what each sequence gave; half of the ids are integers, half are strings.
"""

import asyncio
import json
import sys

import numpy as np
import tritonclient.grpc.aio as triton


def vectors(seed: int, num_steps: int) -> np.ndarray:
    """[steps, 9] random bits."""
    return np.random.default_rng(seed).integers(0, 2, (num_steps, 9)).astype(np.float32)


async def run(
    client: triton.InferenceServerClient, sequence_id: int | str, inputs: np.ndarray
) -> list[list[float]]:
    """The outputs of one sequence, each step sent when the one before is answered."""
    outputs = []
    for i, vector in enumerate(inputs):
        tensor = triton.InferInput("input", [1, 9], "FP32")
        tensor.set_data_from_numpy(vector[None])
        result = await client.infer(
            "copy",
            [tensor],
            sequence_id=sequence_id,
            sequence_start=i == 0,
            sequence_end=i == len(inputs) - 1,
        )
        outputs.append(result.as_numpy("output")[0].tolist())
    return outputs


async def main(address: str) -> None:
    """Run the sequences on a server, and print what they gave."""
    ids: list[int | str] = [201, 202, 203, 204, "caller/1", "caller/2", "caller/3", "caller/4"]
    async with triton.InferenceServerClient(address) as client:
        runs = [run(client, sequence_id, vectors(seed, 4 + seed)) for seed, sequence_id in enumerate(ids)]
        outputs = await asyncio.gather(*runs)
    json.dump({str(sequence_id): given for sequence_id, given in zip(ids, outputs, strict=True)}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
