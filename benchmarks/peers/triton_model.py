"""Triton model: what Triton's Python backend runs, a step of every sequence in a batch in one ONNX Runtime call.

`triton.py` copies this file, the exported step and the state that sequences start from (`start.npz`) into a
model repository. It runs inside Triton, with the packages of `.venv/triton` and none of this project's.

Shapes: B requests in the batch, P sequences at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton puts it on the path


class TritonPythonModel:
    """The step, and the state of every live sequence as a row of a pool [P, ...] for each state tensor."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the step and make the pools."""
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        num_rows = config["sequence_batching"]["oldest"]["max_candidate_sequences"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._step = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        with np.load(folder / "start.npz") as start:
            self._start = {name: start[name] for name in start.files}
        self._output_names = ["output", *(f"next_{name}" for name in self._start)]
        self._pools = {name: np.repeat(value[None], num_rows, axis=0) for name, value in self._start.items()}
        # Where a batch's rows are gathered: fresh arrays of this size would be mapped anew for every batch.
        self._gathered = {
            name: np.empty_like(pool[: config["max_batch_size"]]) for name, pool in self._pools.items()
        }
        self._row_of: dict[int | str, int] = {}
        self._free_rows = list(range(num_rows))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run one step of B sequences; Triton never puts two steps of one sequence in a batch."""
        rows, ended = [], []
        for request in requests:
            sequence_id, flags = request.correlation_id(), request.flags()
            row = self._row_of.get(sequence_id)
            if row is None:
                row = self._row_of[sequence_id] = self._free_rows.pop()
            if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
                for name, pool in self._pools.items():
                    pool[row] = self._start[name]
            if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                ended.append(sequence_id)
            rows.append(row)

        inputs = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        feeds = {"input": np.concatenate(inputs)}
        for name, pool in self._pools.items():
            # "clip" lets take write straight into its output.
            feeds[name] = np.take(pool, rows, axis=0, out=self._gathered[name][: len(rows)], mode="clip")
        outputs, *next_state = self._step.run(self._output_names, feeds)
        for pool, values in zip(self._pools.values(), next_state, strict=True):
            pool[rows] = values

        for sequence_id in ended:
            self._free_rows.append(self._row_of.pop(sequence_id))
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("output", outputs[index : index + 1])])
            for index in range(len(requests))
        ]
