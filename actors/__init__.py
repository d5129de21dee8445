"""Virtual actors on pykka: nodes, stores, transports, the command."""

# Read at first use, so that a test run which finds the pytest plugin here does not
# load all of it.
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.cluster import Cluster
    from actors.collector import calm_collector
    from actors.grain import Grain, handler
    from actors.kind import Kind
    from actors.node import PlacementNode
    from placement.errors import Rejected

__all__ = [
    "Cluster",
    "Grain",
    "Kind",
    "PlacementNode",
    "Rejected",
    "calm_collector",
    "handler",
]

_MODULES = {
    "Cluster": "actors.cluster",
    "Grain": "actors.grain",
    "Kind": "actors.kind",
    "PlacementNode": "actors.node",
    "Rejected": "placement.errors",
    "calm_collector": "actors.collector",
    "handler": "actors.grain",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
