"""The Differentiable Neural Computer of Graves et al. (2016): another way to address the memory.

Where the NTM's heads shift their attention from row to row, here rows are allocated by how much they are used, freed
once they are read, and linked in the order in which they were written. `heads.py` has what the controller asks for,
`access.py` what becomes of the memory, `kernel.py` the same compiled for training on a CPU, `cell.py` the step.

The improvements of Csordás and Schmidhuber (2019) are switches; see `heads.Improvements`.
"""
