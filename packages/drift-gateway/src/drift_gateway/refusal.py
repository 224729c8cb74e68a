"""Requests that are turned away: a gRPC status and one clear line."""

from __future__ import annotations

import grpc

from drift_scheduler.errors import DriftError


class Refusal(DriftError):
    """A request that is not served, with the status its stream ends with."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(field: str, problem: str) -> Refusal:
    """INVALID_ARGUMENT for `field`, a path in GenerateRequest."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}")


def never_fits(message: str) -> Refusal:
    """FAILED_PRECONDITION: the same request will be refused again."""
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, message)


def unavailable(message: str) -> Refusal:
    """UNAVAILABLE: the client may try again."""
    return Refusal(grpc.StatusCode.UNAVAILABLE, message)


def exhausted(message: str) -> Refusal:
    """RESOURCE_EXHAUSTED: there is too much already."""
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
