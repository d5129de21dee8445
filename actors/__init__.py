"""Virtual actors on pykka: nodes, stores, transports, the command."""

from actors.cluster import Cluster
from actors.grain import Grain, handler
from actors.kind import Kind
from actors.node import PlacementNode
from placement.errors import Rejected

__all__ = ["Cluster", "Grain", "Kind", "PlacementNode", "Rejected", "handler"]
