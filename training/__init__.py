"""Training: from settings to a run directory with a checkpoint that `export` reads.

In the order the data flows: `config.py` (what to do), `tasks/` (the sequences), `model/` (the machine),
`loop.py` (the training itself), `evaluate.py` (how well it does), `checkpoint.py` and `records.py` (what is
kept). `python -m training copy` runs it.
"""
