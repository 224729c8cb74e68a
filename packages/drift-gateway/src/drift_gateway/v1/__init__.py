"""Stubs of drift.v1, written by protoc from proto/drift_gateway/v1; this package knows nothing of the server."""
