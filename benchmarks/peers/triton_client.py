"""Triton client: sequences of single steps over streams, by Triton's own Python client, as a load.

`service_load.py` runs it with the packages of `.venv/triton` and none of this project's; it takes its options as JSON,
says "ready", begins when a line comes in, and prints what came of it as JSON. Latencies count from when a step was due.
"""

from __future__ import annotations

import json
import random
import sys
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from time import perf_counter, process_time
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-untyped, import-not-found, unused-ignore]

NUM_STEPS = 50
INTERVAL_S = 0.02
_PATIENCE_S = 30.0


class _Sequence:
    def __init__(self, sequence_id: int, client: Any, start_s: float) -> None:
        self.id, self.client, self.start_s = sequence_id, client, start_s
        self.num_sent = 0


class _Load:
    """Sequences on streams; `steps_per_s` None: one step of each under way, and the next as soon as it is answered."""

    def __init__(
        self,
        address: str,
        first_id: int,
        num_streams: int,
        sequences_per_stream: int,
        steps_per_s: float | None,
        duration_s: float,
    ) -> None:
        self._answers: SimpleQueue[tuple[Any, Any, float]] = SimpleQueue()
        self._sent: dict[str, tuple[_Sequence, float]] = {}
        self._due: list[tuple[float, int, _Sequence]] = []
        self._next_id, self._num_sent = first_id, 0
        self._num_slots = sequences_per_stream * num_streams
        self._steps_per_s, self._duration_s = steps_per_s, duration_s
        self._clients = []
        for _ in range(num_streams):
            client = triton.InferenceServerClient(address)
            client.start_stream(self._on_answer)
            self._clients.append(client)
        self._input = triton.InferInput("input", [1, 9], "FP32")
        self._input.set_data_from_numpy(np.ones((1, 9), np.float32))

    def run(self, seed: int) -> dict[str, Any]:
        start_s, lead_s = perf_counter(), NUM_STEPS * INTERVAL_S
        from_s, to_s = start_s + lead_s, start_s + lead_s + self._duration_s
        if self._steps_per_s is None:
            for _ in range(self._num_slots):
                self._begin(start_s)
        else:
            randomness = random.Random(seed)  # noqa: S311  # nosec B311  # a load, no secret
            for _ in range(round(self._steps_per_s / NUM_STEPS * (to_s - start_s))):
                self._begin(randomness.uniform(start_s, to_s))
        live: set[_Sequence] = set()
        latencies_s: list[float] = []
        start_cpu_s = process_time()
        while (now_s := perf_counter()) < to_s:
            while self._due and self._due[0][0] <= now_s:
                due_s, _, sequence = heappop(self._due)
                live.add(sequence)
                self._send(sequence, due_s, ends=sequence.num_sent == NUM_STEPS - 1)
                if self._steps_per_s is not None and sequence.num_sent < NUM_STEPS:
                    self._put(sequence, sequence.start_s + sequence.num_sent * INTERVAL_S)
            next_s = self._due[0][0] if self._due else to_s
            answer = self._take(min(next_s, to_s) - now_s)
            if answer is None:
                continue
            sequence, due_s, answer_s = answer
            if due_s >= from_s:
                latencies_s.append(answer_s - due_s)
            if self._steps_per_s is None and sequence.num_sent < NUM_STEPS:
                self._put(sequence, answer_s)
            elif self._steps_per_s is None:
                self._begin(answer_s)
        cpu_share = (process_time() - start_cpu_s) / (perf_counter() - start_s)
        in_time = len(latencies_s)
        latencies_s += [answer_s - due_s for due_s, answer_s in self._rest() if due_s >= from_s]
        for sequence in live:
            if sequence.num_sent < NUM_STEPS:
                self._send(sequence, perf_counter(), ends=True)
        self._rest()
        for client in self._clients:
            client.stop_stream()
            client.close()
        return {
            "latencies_s": latencies_s,
            "answered_per_s": in_time / self._duration_s,
            "num_sent": self._num_sent,
            "cpu_share": cpu_share,
        }

    def _begin(self, due_s: float) -> None:
        client = self._clients[self._next_id % len(self._clients)]
        self._put(_Sequence(self._next_id, client, due_s), due_s)
        self._next_id += 1

    def _put(self, sequence: _Sequence, due_s: float) -> None:
        heappush(self._due, (due_s, sequence.id, sequence))

    def _send(self, sequence: _Sequence, due_s: float, ends: bool) -> None:
        request_id = f"{sequence.id}/{sequence.num_sent}"
        self._sent[request_id] = sequence, due_s
        sequence.client.async_stream_infer(
            "copy",
            [self._input],
            request_id=request_id,
            sequence_id=sequence.id,
            sequence_start=sequence.num_sent == 0,
            sequence_end=ends,
        )
        sequence.num_sent += 1
        self._num_sent += 1

    def _on_answer(self, result: Any, error: Any) -> None:
        self._answers.put((result, error, perf_counter()))

    def _take(self, timeout_s: float) -> tuple[_Sequence, float, float] | None:
        try:
            result, error, answer_s = self._answers.get(timeout=max(0.0, timeout_s))
        except Empty:
            return None
        if error is not None:
            raise RuntimeError(f"a step failed: {error}")
        sequence, due_s = self._sent.pop(result.get_response().id)
        return sequence, due_s, answer_s

    def _rest(self) -> list[tuple[float, float]]:
        """Wait for what is not answered; gives when each was due and answered."""
        times_s = []
        while self._sent:
            answer = self._take(_PATIENCE_S)
            if answer is None:
                raise RuntimeError(f"no answer for {_PATIENCE_S} s")
            times_s.append(answer[1:])
        return times_s


def main() -> None:
    options = json.loads(sys.argv[1])
    seed = options.pop("seed")
    load = _Load(**options)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(load.run(seed)), flush=True)


if __name__ == "__main__":
    main()
