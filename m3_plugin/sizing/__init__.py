"""Bytes of weights and caches, and what fits where."""
