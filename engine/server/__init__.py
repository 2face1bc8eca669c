"""A repository's objects served to other hosts over HTTP; docs/server.md describes the protocol.

It knows the connectors' contract and nothing of keys: whatever it serves stays sealed.
"""
