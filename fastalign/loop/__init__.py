"""The lean training loop."""

from .trainer import Trainer

__all__ = ["Trainer"]
