"""What node and agent agree on about the unix socket between them: service, methods, sizes, fixed words."""

from __future__ import annotations

SERVICE, METHODS = "fedqc.Agent", ("Describe", "Train", "Evaluate")


MOST_BYTES = 1 << 30
"""Of one message, in either direction."""


BUSY, STOPPING, FAILED = "busy", "stopping", "failed"
"""What a caller is told besides a gRPC status."""
