"""Generate the synchronous client from the asynchronous one: `make sync`.

    python clients/python/generate_sync.py clients/python/ntm/_sync

`unasync` takes `async` and `await` out and exchanges names; ruff then formats what became shorter.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import unasync

HERE = Path(__file__).parent
SOURCE = HERE / "ntm" / "_async"
RUFF = Path(sysconfig.get_path("scripts")) / "ruff"

NAMES = {
    "_async": "_sync",
    "aiter": "iter",
    "anext": "next",
    "AsyncRetrying": "Retrying",
    "ModelServiceAsyncStub": "ModelServiceStub",
    "SessionServiceAsyncStub": "SessionServiceStub",
    # Our own, and the pairs of ntm/_channel.py and ntm/_concurrency.py.
    "AsyncClient": "Client",
    "AsyncConnection": "Connection",
    "AsyncSession": "Session",
    "AsyncStream": "Stream",
    "AsyncChunkIterator": "ChunkIterator",
    "AsyncChunks": "Chunks",
    "AsyncFunction": "Function",
    "AsyncRequestQueue": "RequestQueue",
    "aio_channel": "channel",
    "async_begin": "begin",
    "async_chunk_iterator": "chunk_iterator",
    "async_next_chunk": "next_chunk",
    "async_result": "result",
}


def generate(target: Path) -> None:
    """Write the synchronous package into a directory, in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    sources = sorted(SOURCE.glob("*.py"))
    rule = unasync.Rule(fromdir=f"{SOURCE}/", todir=f"{target}/", additional_replacements=NAMES)
    unasync.unasync_files([str(source) for source in sources], [rule])
    for source in sources:
        generated = target / source.name
        notice = f"# Generated from ntm/_async/{source.name} by `make sync`: edit that.\n"
        generated.write_text(notice + generated.read_text())
    # `yield from`, which asynchronous generators do not have, and the order of the imports.
    ruff("check", "--fix", "--unsafe-fixes", "--select", "I,UP028", str(target))
    ruff("format", str(target))


def ruff(*arguments: str) -> None:
    """Run ruff with the project's settings."""
    settings = HERE.parents[1] / "pyproject.toml"
    subprocess.run([RUFF, *arguments, "--quiet", "--config", settings], check=True)  # nosec B603  # ruff


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve())
