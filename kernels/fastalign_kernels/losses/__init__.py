"""Losses in plain torch on per-token and per-row vectors."""
