"""The text of a completion that a reward function judges."""

from __future__ import annotations

from typing import Any


def answer_text(completion: Any) -> str:
    """A completion's text; of messages that of the last one of the assistant, or of the only one.

    TRL's functions read the first message, which in an exchange with tools holds no answer.
    """
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = (said or completion)[-1].get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""
