"""Messages and stubs of others' protocols, written by protoc from proto/drift_gateway/compat/wire/."""
