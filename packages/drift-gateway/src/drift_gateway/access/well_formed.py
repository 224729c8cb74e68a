"""Messages that cannot be parsed are refused as any other wrong request is: INVALID_ARGUMENT, with the reason.

gRPC by itself answers UNKNOWN with the name of a Python class, and logs each with a traceback, as often as one comes.
Knows no service and no message.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from drift_gateway.refusal import abort, invalid

KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class WellFormed(grpc.aio.ServerInterceptor):
    """Stands next to the services, behind whoever looks at credentials."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call, made once for each method."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        method = handler_call_details.method
        before, after = self._known.get(method, (None, None))
        if before is not handler:
            after = _well_formed(handler)
            self._known[method] = (handler, after)
        return after


class _Malformed:
    """Stands for a message that is none."""


def kind_of(handler: Any) -> str:
    """Which of KINDS a handler is."""
    return next(kind for kind in KINDS if getattr(handler, kind) is not None)


async def told(behaviour: Any, request: Any, context: Any) -> Any:
    """What a grpc.aio behaviour answers. Messages that it yields are written, which is what grpc.aio does with them
    anyway: so there is no layer more around each."""
    if not inspect.isasyncgenfunction(behaviour):
        return await behaviour(request, context)
    async for response in behaviour(request, context):
        await context.write(response)
    return None


def _well_formed(handler: Any) -> Any:
    """The same handler, refusing what its deserializer does not take."""
    kind = kind_of(handler)
    behaviour, parse = getattr(handler, kind), handler.request_deserializer

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # protobuf's, which differs from one of its implementations to another
            return _Malformed()

    async def of_one(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await _refuse(context)
        return await told(behaviour, request, context)

    async def of_many(requests: AsyncIterator[Any], context: Any) -> Any:
        """Those before it are answered first."""
        wrong = False

        async def right() -> AsyncIterator[Any]:
            nonlocal wrong
            async for request in requests:
                if isinstance(request, _Malformed):
                    wrong = True
                    return
                yield request

        answer = await told(behaviour, right(), context)
        if wrong:
            await _refuse(context)
        return answer

    run = of_many if handler.request_streaming else of_one
    return handler._replace(request_deserializer=parsed, **{kind: run})


async def _refuse(context: Any) -> None:
    await abort(context, invalid("request", "is not the message that the method takes"))
