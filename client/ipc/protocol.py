"""Constants of the unix socket between node and agent: service, methods, sizes, fixed status words."""

from __future__ import annotations

SERVICE, METHODS = "fedqc.Agent", ("Describe", "Train", "Evaluate")

MAX_BYTES = 1 << 30
"""Of one message, in either direction."""
MAX_SOCKET_PATH_BYTES = 107
"""Linux's limit for the path of a unix socket."""

BUSY, STOPPING, FAILED = "busy", "stopping", "failed"
"""Words that a caller gets besides a gRPC status."""
