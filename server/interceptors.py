"""Interceptors: what happens around every rpc. Errors become statuses, calls are counted, bugs are logged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter
from typing import Any, NoReturn

import grpc
import structlog

from server import status
from server.errors import ServingError
from server.metrics import Metrics

log = structlog.get_logger()

STATUS_DETAILS_KEY = "grpc-status-details-bin"

_Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Answers a ServingError with its status, and anything else with INTERNAL after logging it whole."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of this package's rpcs; health and reflection keep theirs."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith("/ntm."):
            return handler
        rpc = method.rpartition("/")[2]
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._around_stream(rpc, handler.stream_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._around_unary(rpc, handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _around_unary(self, rpc: str, handle: Any) -> Any:
        async def around(request: Any, context: _Context) -> Any:
            start_s = perf_counter()
            code = grpc.StatusCode.CANCELLED
            try:
                response = await handle(request, context)
                code = grpc.StatusCode.OK
                return response
            except Exception as error:
                told = _tell(rpc, error)
                code = told.code
                await _abort(told, context)
            finally:
                self._count(rpc, code, start_s)

        return around

    def _around_stream(self, rpc: str, handle: Any) -> Any:
        async def around(requests: Any, context: _Context) -> AsyncIterator[Any]:
            start_s = perf_counter()
            code = grpc.StatusCode.CANCELLED
            try:
                async for response in handle(requests, context):
                    yield response
                code = grpc.StatusCode.OK
            except Exception as error:
                told = _tell(rpc, error)
                code = told.code
                await _abort(told, context)
            finally:
                self._count(rpc, code, start_s)

        return around

    def _count(self, rpc: str, code: grpc.StatusCode, start_s: float) -> None:
        self._metrics.calls.labels(rpc, code.name).inc()
        self._metrics.call_seconds.labels(rpc).observe(perf_counter() - start_s)


def _tell(rpc: str, error: Exception) -> status.Status:
    if not isinstance(error, ServingError):
        log.error("a call failed unexpectedly", rpc=rpc, exc_info=error)
    return status.of(error)


async def _abort(told: status.Status, context: _Context) -> NoReturn:
    trailing = ((STATUS_DETAILS_KEY, told.to_message().SerializeToString()),)
    await context.abort(told.code, told.message, trailing)
