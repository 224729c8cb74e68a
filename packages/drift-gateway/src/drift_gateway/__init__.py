"""Drift's gRPC gateway: the drift.v1 API, its Python client and `drift serve`.

Importing this package loads nothing; `drift_gateway.client` and `drift_gateway.server` are where things are. It
knows the engine only through `drift_core.link`, and never loads torch.
"""

__version__ = "0.1.0"
