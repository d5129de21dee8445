"""The messages between nodes: typed, versioned, one codec."""
