"""Concurrency: the little that asyncio and threads do differently, twice, under names that differ by `async`.

`_async` is written with the asynchronous one of each pair; `make sync` writes `_sync` from it, with the other.
Everything else is the same code. `clients/python/generate_sync.py` lists the pairs.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

from ntm._steps import Inputs, Steps

T = TypeVar("T")

AsyncFunction: TypeAlias = Callable[..., Awaitable[T]]
Function: TypeAlias = Callable[..., T]

Chunk: TypeAlias = Inputs | Steps
AsyncChunks: TypeAlias = AsyncIterable[Chunk] | Iterable[Chunk]
"""What a stream takes its chunks from; an asynchronous one takes them from either kind of iterable."""
Chunks: TypeAlias = Iterable[Chunk]

AsyncChunkIterator: TypeAlias = AsyncIterator[Chunk] | Iterator[Chunk]
ChunkIterator: TypeAlias = Iterator[Chunk]


END: Any = object()
"""In place of a chunk, after the last."""


def async_chunk_iterator(chunks: AsyncChunks) -> AsyncChunkIterator:
    """Begin to take chunks."""
    return aiter(chunks) if isinstance(chunks, AsyncIterable) else iter(chunks)


def chunk_iterator(chunks: Chunks) -> ChunkIterator:
    """Begin to take chunks."""
    return iter(chunks)


async def async_next_chunk(chunks: AsyncChunkIterator) -> Chunk:
    """The next chunk, or `END`."""
    if isinstance(chunks, AsyncIterator):
        return await anext(chunks, END)
    return next(chunks, END)


def next_chunk(chunks: ChunkIterator) -> Chunk:
    """The next chunk, or `END`."""
    return next(chunks, END)


class AsyncRequestQueue(Generic[T]):
    """Requests of a stream, put in by the client and taken out by gRPC."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[T | None] = asyncio.Queue()

    def put(self, request: T) -> None:
        """Send a request."""
        self._queue.put_nowait(request)

    def close(self) -> None:
        """Send no more."""
        self._queue.put_nowait(None)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        request = await self._queue.get()
        if request is None:
            raise StopAsyncIteration
        return request


class RequestQueue(Generic[T]):
    """Requests of a stream, put in by the client and taken out by a thread of gRPC's."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T | None] = queue.SimpleQueue()

    def put(self, request: T) -> None:
        """Send a request."""
        self._queue.put(request)

    def close(self) -> None:
        """Send no more."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        request = self._queue.get()
        if request is None:
            raise StopIteration
        return request


def async_begin(rpc: Any, request: Any, **options: Any) -> Any:
    """Send a request and do not wait for its answer: `async_result` of what comes back does."""
    return rpc(request, **options)


def begin(rpc: Any, request: Any, **options: Any) -> Any:
    """Send a request and do not wait for its answer: `result` of what comes back does."""
    return rpc.future(request, **options)


async def async_result(call: Any) -> Any:
    """The answer of a call that has begun."""
    return await call


def result(call: Any) -> Any:
    """The answer of a call that has begun."""
    return call.result()
