"""Attention on sequences that lie back to back, with exact isolation of segments."""

from .packed import choose_backend, packed_attention, packed_attention_reference
from .segments import Segments

__all__ = ["Segments", "choose_backend", "packed_attention", "packed_attention_reference"]
