"""Conversations -> token ids and labels, with every assistant turn supervised and nothing else.

Two templates. `chat` is the tokenizer's own. `plain` is for tokenizers without one:

    ### Instruction:
    {user}

    ### Response:
    {assistant}{eos}

with an empty line between turns and the system message, if any, as a paragraph on top. Plain text (`text`
rows) is tokenised as it is, between a begin and an end token.

Three things hold for every sample, by construction or by a check:

- the end-of-turn token is supervised: the special token that closes the turn in the chat template, the
  end-of-sequence token where nothing closes it (plain template, and chat templates that forget it);
- the tokens of a prompt, tokenised alone as inference does, are a prefix of the sample's at every assistant
  turn. The plain template tokenises its pieces one by one. A chat is tokenised as a whole and its prefixes
  are compared; where a token would straddle a boundary, tokenising begins anew there;
- a begin token stands in front only where the tokenizer (plain) or its template (chat) puts one, and once. In
  the plain template text that merely looks like a special token (`<s>` in HTML) stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from gradientspace.data.sample import IGNORE_INDEX
from gradientspace.data.shapes import Conversation
from gradientspace.errors import DataError, ModelError

PLAIN_SYSTEM = "{content}\n\n"
PLAIN_USER = "### Instruction:\n{content}\n\n"
PLAIN_ASSISTANT = "### Response:\n"
PLAIN_BETWEEN = "\n\n"
"""After the end-of-sequence token of an assistant turn that is not the last."""

Encoded = tuple[list[int], list[int]]
"""Token ids and labels, of the same length."""

_SYSTEM_PROBE = "gradientspace-system-probe"
_USER_PROBE = "gradientspace-user-probe"
_ANSWER_PROBE = "gradientspace-answer-probe"


class _Piece(NamedTuple):
    text: str
    supervised: bool
    closed: bool = False
    """An assistant turn that ends with a special token of the template."""
    add_eos: bool = False


class Template:
    """How conversations become tokens for one tokenizer.

    `kind` is `chat`, `plain` or `auto` (chat where the tokenizer has a chat template). Raises `ModelError`
    where the tokenizer has no end-of-sequence token, or no chat template although `chat` is asked for.
    """

    kind: str
    """`chat` or `plain`."""
    folds_system: bool
    """The chat template takes no system message, so it goes on top of the first user turn."""

    def __init__(self, tokenizer: Any, kind: str = "auto", system_prompt: str | None = None):
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if kind == "chat" and not has_chat:
            raise ModelError("data.template is 'chat', but the tokenizer has no chat template: set it to 'plain'")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token, so no answer can learn to end: add one")
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.kind = "chat" if kind == "chat" or (kind == "auto" and has_chat) else "plain"
        with_special = tokenizer("a", verbose=False)["input_ids"]
        alone = self._tokenise(["a"])[0]
        self._front = with_special[: with_special.index(alone[0])] if alone else []
        special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self._closing = re.compile(r"\s*(" + "|".join(map(re.escape, special)) + ")")
        self.folds_system = self.kind == "chat" and not self._takes_system()

    def describe(self) -> dict[str, Any]:
        """What the accounting says of the template; JSON-able."""
        plain = PLAIN_SYSTEM + PLAIN_USER + PLAIN_ASSISTANT
        return {
            "kind": self.kind,
            "text": plain if self.kind == "plain" else self.tokenizer.chat_template,
            "stop_tokens": self.tokenizer.convert_ids_to_tokens(self.stop_ids),
            "folds_system": self.folds_system,
        }

    @property
    def jinja(self) -> str:
        """A chat template for other programs, which renders the prompts that the training saw.

        The tokenizer's own, or the plain one in Jinja; the configured system prompt, and the folding of a system
        message into the first user turn, are put in front.
        """
        text = ""
        if self.system_prompt:
            turn = f"[{{'role': 'system', 'content': {json.dumps(self.system_prompt)}}}]"
            text += f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {turn} + messages %}}{{% endif %}}"
        if self.kind == "plain":
            return text + _plain_jinja(self.tokenizer.decode(self._front), self.tokenizer.eos_token)
        if self.folds_system:
            text += _FOLD_JINJA
        return text + self.tokenizer.get_chat_template()

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which generation ends: end of sequence, and what closes an assistant turn of the chat."""
        stops = [self.tokenizer.eos_token_id]
        if self.kind == "chat":
            text = self._render([_user("x"), {"role": "assistant", "content": _ANSWER_PROBE}], "the template")
            closing = self._closing.match(text, text.find(_ANSWER_PROBE) + len(_ANSWER_PROBE))
            if closing:
                stops.append(self.tokenizer.convert_tokens_to_ids(closing[1]))
        return list(dict.fromkeys(stops))

    def encode(self, conversations: Sequence[Conversation], wheres: Sequence[str]) -> list[Encoded]:
        """Ids and labels of each conversation, not truncated; `wheres` name rows in errors (`DataError`)."""
        encoded: list[Encoded | None] = [None] * len(conversations)
        chats = [i for i, row in enumerate(conversations) if self.kind == "chat" and not row.is_text]
        pieces = [self._chat_pieces(conversations[i], wheres[i]) for i in chats]
        for i, pair in zip(chats, self._encode_chats(pieces), strict=True):
            encoded[i] = pair
        plain = [i for i, pair in enumerate(encoded) if pair is None]
        pieces = [self._plain_pieces(conversations[i]) for i in plain]
        for i, (ids, labels) in zip(plain, self._encode_plain(pieces), strict=True):
            front = self._text_front() if conversations[i].is_text else self._front
            encoded[i] = (front + ids, [IGNORE_INDEX] * len(front) + labels)
        return [pair for pair in encoded if pair is not None]

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens that generation starts from: of a prompt, or of messages that end with the user's turn.

        Equal to `Sample.prompt_ids` of a sample with the same messages.
        """
        messages = [_user(prompt)] if isinstance(prompt, str) else [dict(message) for message in prompt]
        if self.kind == "chat":
            turns = self._with_system(messages)
            text = self._render(turns, "the prompt", add_generation_prompt=True)
            pieces = self._cut(text, turns, [False] * len(turns), "the prompt")
            return self._encode_chats([pieces])[0][0]
        row = Conversation.of([*messages, {"role": "assistant", "content": ""}])
        ids, _ = self._encode_plain([self._plain_pieces(row)[:-1]])[0]
        return self._front + ids

    def _plain_pieces(self, row: Conversation) -> list[_Piece]:
        if row.is_text:
            return [_Piece(row.messages[0]["content"], True, add_eos=True)]
        pieces: list[_Piece] = []
        supervised = iter(row.supervised_turns())
        prompt = ""
        for message in self._with_system(row.messages):
            if message["role"] == "assistant":
                pieces.append(_Piece(prompt + PLAIN_ASSISTANT, False))
                pieces.append(_Piece(message["content"], next(supervised), add_eos=True))
                prompt = PLAIN_BETWEEN
            else:
                form = PLAIN_SYSTEM if message["role"] == "system" else PLAIN_USER
                prompt += form.format(content=message["content"])
        return pieces

    def _chat_pieces(self, row: Conversation, where: str) -> list[_Piece]:
        messages = self._with_system(row.messages)
        pieces = self._cut(self._render(messages, where), messages, row.supervised_turns(), where)
        if pieces[-2].closed:
            return pieces
        return [*pieces[:-2], pieces[-2]._replace(add_eos=True)]

    def _cut(self, text: str, messages: list[dict[str, Any]], supervised: list[bool], where: str) -> list[_Piece]:
        """Cut a rendered chat before (after the generation prompt) and after every assistant turn."""
        pieces: list[_Piece] = []
        position = 0
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, i in enumerate(answers):
            content = messages[i]["content"].strip()
            prompt = self._render(messages[:i], where, add_generation_prompt=True) if i else ""
            found = text.find(content, max(len(prompt), position))
            if not text.startswith(prompt) or found < 0:
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns, so the prompt of assistant turn "
                    f"{turn + 1} is no prefix of the conversation: set data.template to 'plain'"
                )
            start = max(len(prompt), position) if i else found
            closing = self._closing.match(text, found + len(content))
            end = closing.end() if closing else found + len(content)
            pieces.append(_Piece(text[position:start], False))
            pieces.append(_Piece(text[start:end], supervised[turn], closed=closing is not None))
            position = end
        return [*pieces, _Piece(text[position:], False)]

    def _encode_chats(self, rows: list[list[_Piece]]) -> list[Encoded]:
        """Tokenise a row as a whole where every piece ends between two tokens, else from left to right."""
        prefixes = [text for pieces in rows for text in accumulate(piece.text for piece in pieces)]
        ids = iter(self._tokenise(prefixes))
        encoded: list[Encoded] = []
        for pieces in rows:
            bounds = [next(ids) for _ in pieces]
            if all(bounds[-1][: len(bound)] == bound for bound in bounds):
                parts = [bounds[-1][len(a) : len(b)] for a, b in zip([[], *bounds], bounds, strict=False)]
                encoded.append(self._join(pieces, parts))
            else:
                encoded.append(self._encode_straddling(pieces))
        return encoded

    def _encode_straddling(self, pieces: list[_Piece]) -> Encoded:
        """Tokenise from left to right, anew after every piece that its follower would change.

        What a piece becomes depends on nothing behind it, so a prompt's tokens stay a prefix.
        """
        parts: list[list[int]] = []
        text, ids = "", []
        for piece in pieces:
            longer = self._tokenise([text + piece.text])[0]
            if longer[: len(ids)] != ids:
                text, ids, longer = "", [], self._tokenise([piece.text])[0]
            parts.append(longer[len(ids) :])
            text, ids = text + piece.text, longer
        return self._join(pieces, parts)

    def _encode_plain(self, rows: list[list[_Piece]]) -> list[Encoded]:
        """Tokenise piece by piece, special tokens in the text as text."""
        ids = iter(self._tokenise([piece.text for pieces in rows for piece in pieces], literal=True))
        return [self._join(pieces, [next(ids) for _ in pieces]) for pieces in rows]

    def _join(self, pieces: list[_Piece], parts: list[list[int]]) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        for piece, part in zip(pieces, parts, strict=True):
            tokens = [*part, self.tokenizer.eos_token_id] if piece.add_eos else part
            ids += tokens
            labels += tokens if piece.supervised else [IGNORE_INDEX] * len(tokens)
        return ids, labels

    def _tokenise(self, texts: list[str], *, literal: bool = False) -> list[list[int]]:
        if not texts:
            return []
        options: dict[str, Any] = {"split_special_tokens": True} if literal else {}
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"]

    def _text_front(self) -> list[int]:
        """Plain text always comes after a token, so that its first token is predicted too."""
        bos = self.tokenizer.bos_token_id
        return self._front or [self.tokenizer.eos_token_id if bos is None else bos]

    def _with_system(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        turns = [dict(message) for message in messages]
        if self.system_prompt and not any(turn["role"] == "system" for turn in turns):
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        if self.folds_system and turns and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
            user = next((turn for turn in turns if turn["role"] == "user"), None)
            if user is not None:
                user["content"] = f"{system}\n\n{user['content']}"
        return turns

    def _takes_system(self) -> bool:
        """Whether the chat template shows a system message. Raises `ModelError` where it shows no user's."""
        self.folds_system = False
        try:
            if _USER_PROBE not in self._render([_user(_USER_PROBE)], "", add_generation_prompt=True):
                raise DataError("a user's message does not appear in what it renders")
        except DataError as error:
            raise ModelError(f"the chat template cannot be used: {error}; set data.template to 'plain'") from error
        system = {"role": "system", "content": _SYSTEM_PROBE}
        try:
            return _SYSTEM_PROBE in self._render([system, _user("x")], "", add_generation_prompt=True)
        except DataError:
            return False

    def _render(self, messages: list[dict[str, Any]], where: str, *, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program by its author: it may raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{where}: the chat template refuses these turns: {reason}") from error


_FOLD_JINJA = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = [{'role': 'user', 'content': "
    "messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] %}{% endif %}"
)


def _plain_jinja(front: str, eos: str) -> str:
    """The plain template in Jinja. Constants are expressions: a line break after a tag would be trimmed."""

    def filled(form: str) -> str:
        before, after = form.split("{content}")
        return f"{json.dumps(before)} + message['content'] + {json.dumps(after)}"

    return (
        f"{{{{ {json.dumps(front)} }}}}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{{{{ {filled(PLAIN_SYSTEM)} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {filled(PLAIN_USER)} }}}}"
        f"{{% else %}}{{{{ {json.dumps(PLAIN_ASSISTANT)} + message['content'] + {json.dumps(eos)} }}}}"
        f"{{% if not loop.last %}}{{{{ {json.dumps(PLAIN_BETWEEN)} }}}}{{% endif %}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(PLAIN_ASSISTANT)} }}}}{{% endif %}}"
    )


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
