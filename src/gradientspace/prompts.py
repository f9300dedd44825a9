"""Which text of a prompt or a conversation the router reads, in training and at inference alike.

The rule: the user turns, oldest first, joined by a newline (the system turns where there is no user turn);
assistant turns are never read, since at inference the answer does not exist. Of a text over 1,000 characters
the first and the last 500 stay: the task is named first or last, the matter in between is long. A sentence
encoder reads about 256 word pieces, some 1,000 characters, and would silently drop all that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradientspace.errors import DataError

CONVERSATION_RULE = "user-turns-newline-first-500-last-500"
"""Name of the rule above, saved with every router; a router trained under another rule is refused."""

_HALF = 500

Prompt = str | Sequence[Mapping[str, Any]]
"""A plain text or a conversation, messages `[{"role": ..., "content": ...}, ...]`."""


def opening(prompt: Prompt) -> Prompt:
    """A conversation up to its first user turn, which every later request of the same conversation repeats.

    Routing this keeps a conversation with one expert. A plain text is its own opening.
    """
    if isinstance(prompt, str):
        return prompt
    users = (i for i, turn in enumerate(prompt) if isinstance(turn, Mapping) and turn.get("role") == "user")
    first = next(users, len(prompt) - 1)
    return prompt[: first + 1]


def routing_text(prompt: Prompt) -> str:
    """The text the router reads of a plain prompt or of messages `[{"role": ..., "content": ...}, ...]`.

    `content` is a string or OpenAI-style parts, of which the text parts are read. Blank turns are skipped,
    outer white space is stripped, an empty prompt gives "". Reading a text twice changes nothing more.
    Raises `DataError` for anything else.
    """
    text = prompt if isinstance(prompt, str) else _conversation_text(prompt)
    text = text.strip()
    if len(text) <= 2 * _HALF:
        return text
    return text[:_HALF].rstrip() + "\n" + text[-(_HALF - 1) :].lstrip()


def _conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        turns = [(message["role"], _content_text(message["content"])) for message in messages]
    except (TypeError, KeyError, AttributeError) as error:
        got = str(messages)[:80]
        raise DataError(
            f"a prompt must be a string or a list of messages with role and content, got {got!r}"
        ) from error
    for role in ("user", "system"):
        texts = [text for turn_role, text in turns if turn_role == role and text]
        if texts:
            return "\n".join(texts)
    return ""


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content.strip()
    parts = [part if isinstance(part, str) else part.get("text") or "" for part in content]
    return "\n".join(part.strip() for part in parts if part.strip())
