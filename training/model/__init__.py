"""The Neural Turing Machine cell of Graves, Wayne and Danihelka (2014), section 3, and its baselines.

In the order the data flows through one step: `controller.py` reads the input and decides, `heads.py` turns
its decision into requests, `addressing.py` turns requests into attention over the memory rows, `memory.py`
writes and reads by that attention. `access.py` is the last three in one, and `kernel.py` the same compiled for
training on a CPU. `cell.py` ties all into a step, `plain.py` is the controller alone, `dnc/` is the machine of Graves
et al. (2016), `state.py` is what passes from one step to the next, `unroll.py` runs many steps, `fused_unroll.py` runs
them as one operation. `layer.py` makes a cell a layer of anybody's network.
"""

from training.model.cell import NTMCell, with_memory_rows
from training.model.dnc.cell import DNCCell
from training.model.layer import NTM, RecurrentLayer, detach_state
from training.model.plain import PlainCell
from training.model.state import (
    DNCState,
    HiddenState,
    LSTMState,
    NTMState,
    PlainState,
    named_tensors,
    with_tensors,
)
from training.model.unroll import Cell, unroll

__all__ = [
    "NTM",
    "Cell",
    "DNCCell",
    "DNCState",
    "HiddenState",
    "LSTMState",
    "NTMCell",
    "NTMState",
    "PlainCell",
    "PlainState",
    "RecurrentLayer",
    "detach_state",
    "named_tensors",
    "unroll",
    "with_memory_rows",
    "with_tensors",
]
