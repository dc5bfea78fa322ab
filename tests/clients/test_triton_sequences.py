"""The programs in `clients/triton`, unchanged, on this server and on Triton's own: the same bits.

Both serve the shipped model `copy`: this server its file, Triton the same step in its Python backend. Triton is a large
package and `make test` does not install it: `make bench` does, and `python -m benchmarks.peers.triton install`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import triton
from benchmarks.server_process import MODELS, serving
from ntm import Client

needs_client = pytest.mark.skipif(
    not (triton.ENVIRONMENT / "bin" / "python").exists(),
    reason="no environment for tritonclient: `make test` makes .venv/triton",
)
needs_server = pytest.mark.skipif(
    not triton.is_installed(),
    reason="Triton's own server is not installed: python -m benchmarks.peers.triton install",
)


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with serving(MODELS) as (address, _):
        yield address


@pytest.fixture(scope="module")
def theirs() -> Iterator[str]:
    with triton.serving(num_sequences=16) as (address, _):
        yield address


def test_there_is_a_program_for_each_way_to_call() -> None:
    assert [program.stem for program in triton.PROGRAMS] == ["by_asyncio", "stream", "unary"]


@needs_client
def test_a_programs_sequences_give_what_sessions_give(ours: str) -> None:
    [program] = (program for program in triton.PROGRAMS if program.stem == "unary")

    given = triton.run(program, ours)

    with Client(ours) as client:
        for seed in (101, 102):  # those that take turns
            with client.session("copy") as session:
                inputs = np.random.default_rng(seed).integers(0, 2, (8, 9)).astype(np.float32)
                np.testing.assert_array_equal(np.array(given[str(seed)], np.float32), session.run(inputs))


@needs_server
@pytest.mark.parametrize("program", triton.PROGRAMS, ids=lambda program: program.stem)
def test_a_program_of_tritons_client_gives_the_same_bits_on_both_servers(
    ours: str, theirs: str, program: Path
) -> None:
    given = triton.run(program, ours)

    assert given == triton.run(program, theirs)
    assert all(np.isfinite(outputs).all() for outputs in given.values())
