"""Export: from a run directory's checkpoint to a model file that the server loads.

In the order the data flows: `step.py` (one time step as a function of named tensors), `spec.py` (what the file
says about itself), `access.py` (heads and memory in the operations that ONNX Runtime runs best), `onnx_file.py` (the
file), `verification.py` (whether it does what the cell does), `publish.py` (all of it, into place by one rename).
`python -m export RUN models/copy/1` runs it.
"""
