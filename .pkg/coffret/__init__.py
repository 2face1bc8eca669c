"""Coffret: encrypted, deduplicated backups, fast."""

__version__ = "0.1.0"
