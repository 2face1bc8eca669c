"""Connectors: each reads and writes objects on one kind of storage, by the contract in `base`."""
