"""The server: holds each session's state and runs the steps of many sessions together.

Read it in the order a step travels: `service` (gRPC) -> `sessions` (whole messages, in order) ->
`engine` (the loop) -> `scheduler` (who is next) -> `model_runner` (pools on the device). A model gets there by
`repository` (the models directory) -> `spec` (what the file declares) -> `graphs` (what the device runs).
`lifecycle` puts them together. It never imports torch, `training` or `export`.
"""

import os

# From version 1.32 on, ONNX Runtime reports its use to its maker, unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Before its first use: has gRPC read in the thread that waits for events, not in a pool that then wakes that one.
# docs/performance-experiments.md says what it saves.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
