"""Rows of any common shape -> one normalised conversation.

| shape | columns |
|---|---|
| messages | `messages`: a list of {role, content} |
| sharegpt | `conversations`: a list of {from, value} |
| alpaca | `instruction`, `output` (or `response`, `completion`, `answer`), maybe `input` or `context` |
| prompt-completion | `prompt` and `completion` (or as above); both may be lists of messages |
| question-answer | `question` and `answer` (or as above) |
| input-output | `input` and `output` (or as above) |
| text | `text`: the whole text is trained on |

A shape is detected from the first row of a file, in the order of the table, and must hold for all its rows.
`SourceConfig.fields` (our name -> column) takes the place of detection.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from gradientspace.errors import ConfigError, DataError

_PROMPTS = {
    "instruction": "alpaca",
    "prompt": "prompt-completion",
    "question": "question-answer",
    "input": "input-output",
}
_COMPLETIONS = ("output", "completion", "response", "answer")
_OPTIONAL = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "id": ("id",),
    "domain": ("domain",),
    "source": ("source",),
}
_ALIASES = {
    "instruction": "prompt",
    "question": "prompt",
    "output": "completion",
    "response": "completion",
    "answer": "completion",
    "conversations": "messages",
    "context": "input",
    "system_prompt": "system",
}
_FIELDS = ("messages", "prompt", "input", "completion", "system", "text", "id", "domain", "source")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
_OPENING_WORDS = 32


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row as a conversation: `messages` ends with an assistant turn."""

    id: str | None
    messages: list[dict[str, str]]
    n_context: int
    """The first messages, never supervised: the prompt of a prompt-completion row; 0 otherwise."""
    is_text: bool
    """Plain text: one assistant turn, no template around it."""
    domain: str | None
    source: str | None

    @classmethod
    def of(cls, messages: list[dict[str, str]]) -> Conversation:
        """A conversation of given messages, without labels."""
        return cls(None, messages, 0, False, None, None)

    def supervised_turns(self) -> list[bool]:
        """For every assistant turn, in order, whether it is trained on."""
        return [i >= self.n_context for i, m in enumerate(self.messages) if m["role"] == "assistant"]

    @property
    def prompt(self) -> str:
        """The user's turns joined by a newline; of plain text, its first 32 words."""
        if self.is_text:
            return " ".join(self.messages[0]["content"].split(maxsplit=_OPENING_WORDS)[:_OPENING_WORDS])
        turns = (m["content"].strip() for m in self.messages if m["role"] == "user")
        return "\n".join(turn for turn in turns if turn)

    def content_hash(self) -> str:
        """128 bits of a SHA-256 over all that is tokenised: equal for exact duplicates, stable everywhere."""
        content = json.dumps([self.messages, self.n_context, self.is_text])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass(slots=True)
class Mapping:
    """Which column is read as what. Optional columns join `columns` when a row first has them."""

    shape: str
    columns: dict[str, str]

    def __str__(self) -> str:
        return f"{self.shape}: " + ", ".join(f"{name} <- {column}" for name, column in self.columns.items())

    def value(self, values: dict[str, Any], name: str) -> Any:
        """The value of our optional field `name` in a row; None where the row has none."""
        if name not in self.columns:
            taken = self.columns.values()
            column = next((c for c in _OPTIONAL[name] if c in values and c not in taken), None)
            if column is None:
                return None
            self.columns[name] = column
        return values.get(self.columns[name])


def detect_mapping(values: dict[str, Any], fields: dict[str, str], where: str) -> Mapping:
    """The mapping of a file, from its first row. Raises `DataError` or (`fields`) `ConfigError`."""
    columns = _explicit_columns(fields, values, where)
    if "messages" not in columns and "text" not in columns and not {"prompt", "completion"} <= columns.keys():
        unnamed = {name: value for name, value in values.items() if name not in columns.values()}
        if "prompt" in columns:
            detected = _first(_COMPLETIONS, unnamed, "completion")
        elif "completion" in columns:
            detected = _first(tuple(_PROMPTS), unnamed, "prompt")
        else:
            detected = _detected_columns(unnamed, where)
        columns = detected | columns
    return Mapping(_shape(columns, where), columns)


def _first(candidates: tuple[str, ...], values: dict[str, Any], name: str) -> dict[str, str]:
    return next(({name: column} for column in candidates if column in values), {})


def _explicit_columns(fields: dict[str, str], values: dict[str, Any], where: str) -> dict[str, str]:
    columns: dict[str, str] = {}
    for name, column in fields.items():
        ours = _ALIASES.get(name, name)
        if ours not in _FIELDS:
            near = difflib.get_close_matches(name, [*_FIELDS, *_ALIASES], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_FIELDS)}"
            raise ConfigError(f"unknown field {name!r} in `fields`; {hint}")
        if ours in columns:
            raise ConfigError(f"`fields` names {ours} twice: {columns[ours]!r} and {column!r}")
        if column not in values and ours not in _OPTIONAL:
            raise DataError(f"{where} has no column {column!r} (fields: {name}); it has {_list(values)}")
        columns[ours] = column
    return columns


def _detected_columns(values: dict[str, Any], where: str) -> dict[str, str]:
    for column in ("messages", "conversations", "conversation"):
        if column in values:
            return {"messages": column}
    prompt = next((c for c in _PROMPTS if c in values), None)
    completion = next((c for c in _COMPLETIONS if c in values), None)
    if prompt and completion:
        return {"prompt": prompt, "completion": completion}
    if "text" in values and not prompt:
        return {"text": "text"}
    if prompt:
        raise DataError(
            f"{where} has no output: none of {', '.join(_COMPLETIONS)} among its columns {_list(values)}; "
            "name the column with fields: {completion: COLUMN}"
        )
    raise DataError(
        f"{where} has no shape we know (messages, conversations, instruction/output, prompt/completion, "
        f"question/answer, text): its columns are {_list(values)}; name them with `fields`"
    )


def _shape(columns: dict[str, str], where: str) -> str:
    if "messages" in columns:
        return "sharegpt" if columns["messages"].startswith("conversation") else "messages"
    if "prompt" in columns and "completion" in columns:
        return _PROMPTS.get(columns["prompt"], "prompt-completion")
    if "text" in columns:
        return "text"
    missing = "completion" if "prompt" in columns else "prompt"
    raise ConfigError(f"`fields` must name {missing} too (or messages, or text) to read {where}")


def _list(values: dict[str, Any]) -> str:
    names = [name if name.isprintable() and name else repr(name) for name in (str(n)[:40] for n in values)]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def conversation(values: dict[str, Any], mapping: Mapping, where: str) -> Conversation | None:
    """The conversation of a row, or None where its prompt or its completion is blank.

    `where` names the row in errors ("mix.jsonl, row 7"). Raises `DataError`: no output, a value of a wrong
    type, an unknown role, text that is not Unicode.
    """
    n_context = 0
    if "messages" in mapping.columns:
        messages = _messages(_required(values, mapping, "messages", where), where)
        system = mapping.value(values, "system")
        if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    elif "text" in mapping.columns:
        text = _text(_required(values, mapping, "text", where), "text", where)
        messages = [{"role": "assistant", "content": text}]
    else:
        messages, n_context = _prompt_completion(values, mapping, where)
    messages, blank = _ending_with_assistant(messages, where)
    is_text = "text" in mapping.columns
    if blank or not (is_text or any(m["role"] == "user" and m["content"].strip() for m in messages)):
        return None
    return Conversation(
        id=_label(values, mapping, "id"),
        messages=messages,
        n_context=n_context,
        is_text=is_text,
        domain=_label(values, mapping, "domain"),
        source=_label(values, mapping, "source"),
    )


def _ending_with_assistant(messages: list[dict[str, str]], where: str) -> tuple[list[dict[str, str]], bool]:
    """Turns after the last answer teach nothing and are left out; also whether that answer is blank."""
    last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), None)
    if last is None:
        if not messages:
            return [], True
        raise DataError(f"{where} has no output: no turn of the assistant among its {len(messages)} messages")
    return messages[: last + 1], not messages[last]["content"].strip()


def _prompt_completion(values: dict[str, Any], mapping: Mapping, where: str) -> tuple[list[dict[str, str]], int]:
    prompt = _required(values, mapping, "prompt", where)
    completion = _required(values, mapping, "completion", where)
    if isinstance(prompt, list):
        context = _messages(prompt, where)
        if isinstance(completion, list):
            return context + _messages(completion, where), len(context)
        return [*context, _message("assistant", _text(completion, "completion", where))], len(context)
    user = _text(prompt, mapping.columns["prompt"], where)
    extra = mapping.value(values, "input")
    if extra is not None:
        parts = [user, _text(extra, mapping.columns["input"], where)]
        user = "\n\n".join(part for part in parts if part.strip())
    messages = [_message("user", user)]
    system = mapping.value(values, "system")
    if system is not None and _text(system, "system", where).strip():
        messages.insert(0, _message("system", _text(system, "system", where)))
    if isinstance(completion, list):
        return messages + _messages(completion, where), len(messages)
    return [*messages, _message("assistant", _text(completion, mapping.columns["completion"], where))], 0


def _required(values: dict[str, Any], mapping: Mapping, name: str, where: str) -> Any:
    column = mapping.columns[name]
    value = values.get(column)
    if value is not None and value == value:  # NaN is how data frames write null
        return value
    what = {"completion": "output", "prompt": "prompt"}.get(name, name)
    reason = f"column {column!r} is null" if column in values else f"it lacks the column {column!r}"
    raise DataError(f"{where} has no {what}: {reason}; its columns are {_list(values)}")


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: messages must be a list of turns, not {_kind(value)}")
    messages = []
    for turn, item in enumerate(value, start=1):
        at = f"{where}, turn {turn}"
        if not isinstance(item, dict):
            raise DataError(f"{at} must have a role and a content, but is {_kind(item)}")
        role = item.get("role", item.get("from"))
        content = item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise DataError(f"{at} has the role {str(role)[:40]!r}: expected system, user or assistant")
        messages.append(_message(_ROLES[role.lower()], _content(content, at)))
    return messages


def _content(value: Any, where: str) -> str:
    """Text, or OpenAI-style parts that are all text."""
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where} holds a part that is not text: only text can be trained on")
        value = "\n".join(map(str, texts))
    if value is None:
        raise DataError(f"{where} has no content")
    return _text(value, "content", where)


def _text(value: Any, column: str, where: str) -> str:
    """Text as it is; a plain number as people write it (answers of arithmetic sets are often numbers)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {column} holds half of a surrogate pair, which is no character") from error
    return value


def _label(values: dict[str, Any], mapping: Mapping, name: str) -> str | None:
    """Labels and ids are text or whole numbers; anything else is no label."""
    value = mapping.value(values, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        return None
    return value.encode(errors="replace").decode()


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", bytes: "bytes"}
    names |= {int: "a number", float: "a number", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")
