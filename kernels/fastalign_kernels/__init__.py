"""Fused language-model heads, attention on packed tokens and losses; needs torch, uses triton where it is."""
