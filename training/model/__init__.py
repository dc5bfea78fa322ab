"""The Neural Turing Machine cell of Graves, Wayne and Danihelka (2014), section 3.

In the order the data flows through one step: `controller.py` reads the input and decides, `heads.py` turns
its decision into requests, `addressing.py` turns requests into attention over the memory rows, `memory.py`
writes and reads by that attention, `cell.py` ties them into a step, `state.py` is what passes from one step
to the next, `unroll.py` runs many steps.
"""

from training.model.cell import NTMCell
from training.model.state import LSTMState, NTMState, Stateless, named_tensors, with_tensors
from training.model.unroll import unroll

__all__ = ["LSTMState", "NTMCell", "NTMState", "Stateless", "named_tensors", "unroll", "with_tensors"]
