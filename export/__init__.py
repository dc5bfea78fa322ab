"""Export: from a run directory's checkpoint, or any module of one step, to a model file that the server loads.

In the order the data flows: `step.py` (one time step as a function of named tensors) with the names of `naming.py`,
`spec.py` (what the file says about itself), `access.py` (heads and memory in the operations that ONNX Runtime runs
best), `onnx_file.py` (the file), `verification.py` (whether it does what the module does), `publish.py` (all of it,
into place by one rename), `restore.py` (back from a file to a run). `python -m export RUN models/copy/1` runs it for a
run, and `export_step` for a module of one's own.
"""

from export.publish import export_step

__all__ = ["export_step"]
