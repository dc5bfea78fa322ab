"""The server: holds each session's state and runs the steps of many sessions together.

Its packages, in the order a step travels: `rpc` (gRPC) -> `sessions` (order, exactly once, paging) -> `engine` (who
runs next) -> `runtime` (pools on the device). `storage` is what outlives the process, `model` what a model file is,
`security` who may do what. `launch` puts them together. It never imports torch, `training` or `export`.
"""

import os

# From version 1.32 on, ONNX Runtime reports its use to its maker, unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Before its first use: has gRPC read in the thread that waits for events, not in a pool that then wakes that one.
# docs/performance-experiments.md says what it saves.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
