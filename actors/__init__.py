"""Virtual actors on pykka: nodes, stores, transports, the command."""
