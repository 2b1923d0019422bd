"""A process that compares mathematical answers: there the time-outs of math-verify work, which need a main thread.

In a thread of the trainer they do not, and an answer such as 9^(9^(9^9)) would hold the interpreter's lock for ever.
"""

from __future__ import annotations

import logging
from typing import Any

from .workers import serve

PARSING_SECONDS, VERIFYING_SECONDS = 10, 5  # as in TRL


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """{solution, answer (None: only the solution is parsed)} -> {reward, gold, answer}, as TRL logs and scores."""
    from latex2sympy2_extended import NormalizationConfig  # pyright: ignore[reportMissingImports]
    from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    gold = parse(request["solution"], parsing_timeout=PARSING_SECONDS)
    if not gold:
        return {"reward": None, "gold": "[unparseable]", "answer": "[skipped]"}
    extraction = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,  # what is boxed comes first
        try_extract_without_anchor=False,
    )
    answer = parse(
        request["answer"],
        extraction_config=[extraction],
        extraction_mode="first_match",
        parsing_timeout=PARSING_SECONDS,
    )
    reward = float(verify(gold, answer, timeout_seconds=VERIFYING_SECONDS))
    return {"reward": reward, "gold": str(gold), "answer": str(answer) if answer else "[unparseable]"}


def main(folder: str) -> None:
    """Serve comparisons."""
    logging.disable(logging.CRITICAL)
    serve(compare)
