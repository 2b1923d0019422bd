"""A small model learns a task with checkable answers here and now: `fastalign demo`."""

from .run import main

__all__ = ["main"]
