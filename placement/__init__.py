"""The placement decisions: pure, deterministic, no I/O."""

from placement.errors import PlacementError
from placement.identity import BadIdentity, Identity

__all__ = ["BadIdentity", "Identity", "PlacementError"]
