"""Messages -> token ids and supervised spans: the one place that knows the chat format, for training and for talking.

A conversation looks like this, with `<s>` and `</s>` as single control tokens:

    <s>system
    你是一个助手。</s>
    <s>user
    你好</s>
    <s>assistant
    你好！</s>

An assistant that thinks before it answers, written with the tags in `content` or apart in `reasoning_content`, says

    <think>
    1 加 1 是 2。
    </think>
    <answer>
    2
    </answer>

Content is encoded apart from the control tokens, so text can never forge one: `</s>` typed by a user is four
ordinary characters. Only what an assistant says may hold the tags (`<think>`, `<answer>`, ...) as single tokens.
The Jinja template next to the tokenizer renders the same text for other libraries.
"""

import hashlib
import json
import re
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.jsonl import Malformed, json_type, shown

Message = dict[str, Any]
"""`role` and `content`; a system message may hold `tools`, an assistant's `tool_calls` and `reasoning_content`.

`tools` and `tool_calls` are lists of objects, as OpenAI has them, or such a list as JSON text, as in MiniMind's files.
"""

ROLES = ("system", "user", "assistant", "tool")
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
TAGS = (
    *("<think>", "</think>", "<answer>", "</answer>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
RESERVED_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = CONTROL_TOKENS + TAGS + RESERVED_TOKENS
"""In the order of their ids, 0 to 15."""

_OWNERS = {"tools": "system", "tool_calls": "assistant", "reasoning_content": "assistant"}
"""Extra keys of a message, and the only role that may have them."""

Piece = str | int
"""A stretch of text still to encode, or a finished token id."""


class ChatFormat:
    """Encodes texts, conversations and prompts for one tokenizer; long lists are encoded on all cores."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self.bos_id is None or self.eos_id is None:
            raise ValueError(
                f"the tokenizer in {tokenizer.name_or_path} names no beginning (bos_token) or no end (eos_token) of a "
                "text: is its tokenizer_config.json missing? Copy it there, or use a MiniMind's tokenizer"
            )
        self._template = tokenizer.chat_template or ""
        self._vocab = tokenizer.get_vocab()
        self._control_ids = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.update(truncation=None, padding=None, post_processor=None)
        self._content = json.dumps(content, sort_keys=True, ensure_ascii=False)
        # Without its added tokens a tokenizer cannot produce a control id: no merge leads to one.
        self._plain = Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
        # A tokenizer that lacks a tag (MiniMind's of early 2025 has none) reads it as ordinary text.
        added = tokenizer.get_added_vocab()
        self._tag_ids = {tag: added[tag] for tag in TAGS if tag in added}
        self._tags = re.compile(f"({'|'.join(self._tag_ids) or '(?!)'})")
        assistant, newline = self._encode(["assistant\n", "\n"])
        self._assistant = [self.bos_id, *assistant]
        self._end_of_turn = [self.eos_id, *newline]

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """`<s>` text `</s>` for each text. Raises ValueError for text that is not valid Unicode."""
        return [[self.bos_id, *ids, self.eos_id] for ids in self._encode(texts)]

    def encode_conversations(self, conversations: list[list[Message]]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids of each conversation and its supervised spans [start, end): first answer token to `</s>` inclusive.

        An assistant's turn without any content has no span: there is nothing to learn from it.
        Raises ValueError for an empty conversation, an unknown role, or content that is not text.
        """
        for i, messages in enumerate(conversations):
            check_messages(messages, f"conversation {i} of this batch")
        # All text of all conversations goes to the tokenizer at once: it works on many texts in parallel.
        rendered, texts = [], []
        for messages in conversations:
            turns = [self._render(message) for message in messages]
            rendered.append(turns)
            for turn in turns:
                texts += [piece for piece in turn if isinstance(piece, str)]
        encoded = iter(self._encode(texts))

        # Its answers come back in the same order, and take their places between the control tokens.
        result = []
        for messages, turns in zip(conversations, rendered, strict=True):
            ids: list[int] = []
            spans = []
            for message, turn in zip(messages, turns, strict=True):
                start = len(ids) + len(self._assistant)
                for piece in turn:
                    if isinstance(piece, str):
                        ids += next(encoded)
                    else:
                        ids.append(piece)
                if message["role"] == "assistant" and len(ids) > start:
                    spans.append((start, len(ids) + 1))  # one more for </s>
                ids += self._end_of_turn
            result.append((ids, spans))
        return result

    def encode_prompt(self, messages: list[Message], max_tokens: int | None = None) -> list[int]:
        """Token ids of the messages, ending with the header of the answer to come (`<s>assistant` and a newline).

        Where they exceed `max_tokens`, whole exchanges (a user's message and all that follows it up to the next one)
        are dropped, oldest first; system messages and the last exchange stay. Raises ValueError when these alone are
        too long, and for messages that `encode_conversations` would refuse.
        """
        check_messages(messages)
        # The exchange that each message belongs to; None stays in any case. An answer without a question before it is
        # in exchange 0: system, user, assistant, user -> None, 1, 1, 2.
        last, exchanges = 0, []
        for message in messages:
            if message["role"] == "user":
                last += 1
            exchanges.append(None if message["role"] == "system" else last)

        turns = [ids for ids, _ in self.encode_conversations([[message] for message in messages])]
        length = len(self._assistant) + sum(map(len, turns))
        oldest = 0
        while max_tokens is not None and length > max_tokens and oldest < last:
            for i, exchange in enumerate(exchanges):
                if exchange == oldest:
                    length -= len(turns[i])
                    turns[i] = []
            oldest += 1
        if max_tokens is not None and length > max_tokens:
            raise ValueError(
                f"the system message and the last user message need {length} tokens, but the prompt may have only "
                f"{max_tokens}: shorten them, or allow a longer context or fewer new tokens"
            )
        return [*chain.from_iterable(turns), *self._assistant]

    def fingerprint(self) -> str:
        """sha256 of all that decides token ids: the tokenizer's content and the chat template."""
        return hashlib.sha256(f"{self._content}\0{self._template}".encode()).hexdigest()

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes each token stands for, 0 for control tokens; to turn a loss into bits per byte."""
        # One character of the byte-level alphabet is one byte, and tags are ASCII.
        sizes = np.zeros(max(self._vocab.values()) + 1, dtype=np.int64)  # numbers may be left out
        for token, i in self._vocab.items():
            sizes[i] = len(token)
        sizes[self._control_ids] = 0
        return sizes

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:  # all that tokenizers says about text without a UTF-8 form
            for text in texts:
                check_text(text)
            raise

    def _render(self, message: Message) -> list[Piece]:
        """One turn up to, not including, its `</s>`; text between two ids is one piece, as in the rendered text."""
        role, content = message["role"], message.get("content") or ""
        if role == "assistant":
            return self._assistant + self._join(self._answer(message, content))
        pieces = [f"{role}\n{content}"]
        if role == "tool":
            pieces = [*self._split("tool\n<tool_response>\n"), content, *self._split("\n</tool_response>")]
        elif message.get("tools"):
            pieces += self._tool_block(message, content)
        return [self.bos_id, *self._join(pieces)]

    def _answer(self, message: Message, content: str) -> list[Piece]:
        if reasoning := message.get("reasoning_content"):
            if content and "<answer>" not in content:
                content = f"<answer>\n{content}\n</answer>"
            content = f"<think>\n{reasoning}\n</think>" + ("\n" if content else "") + content
        pieces = self._split(content)
        for i, call in enumerate(_json_list(message, "tool_calls")):
            if isinstance(message["tool_calls"], str):
                text = _dumps(call)
            else:
                call = call.get("function") or call
                arguments = call["arguments"] if isinstance(call["arguments"], str) else _dumps(call["arguments"])
                text = f'{{"name": {_dumps(call["name"])}, "arguments": {arguments}}}'
            opening, closing = self._split("<tool_call>"), self._split("</tool_call>")
            pieces += ["\n" if content or i else "", *opening, f"\n{text}\n", *closing]
        return pieces

    def _tool_block(self, message: Message, content: str) -> list[Piece]:
        tools = "".join(_dumps(tool) + "\n" for tool in _json_list(message, "tools"))
        return [
            "\n\n" if content else "",
            f"# Tools\n\n可以调用下列函数：\n<tools>\n{tools}</tools>\n\n需要调用时，按下面的格式输出：\n",
            *self._split('<tool_call>\n{"name": 函数名, "arguments": 参数}\n</tool_call>'),
        ]

    def _split(self, text: str) -> list[Piece]:
        """Text in which the tags are tokens."""
        return [self._tag_ids.get(part, part) for part in self._tags.split(text) if part]

    @staticmethod
    def _join(pieces: list[Piece]) -> list[Piece]:
        """Adjacent strings become one, since a merge may cross their border."""
        joined: list[Piece] = []
        for piece in pieces:
            if joined and isinstance(piece, str) and isinstance(joined[-1], str):
                joined[-1] += piece
            else:
                joined.append(piece)
        return joined


def check_messages(messages: list[Message], name: str = "the conversation") -> None:
    """Raises Malformed, saying which message of `name` and why, unless the messages can be rendered."""
    if not messages:
        raise Malformed("empty", f"{name} is empty: it needs at least one message with role and content")
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {name}"
        if not isinstance(message, dict):
            found = json_type(message)
            raise Malformed("wrong type", f"{where} is a JSON {found}: it must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise Malformed("unknown role", f"{where} has the role {shown(role)}: use one of {', '.join(ROLES)}")
        may_be_absent = message.get("tool_calls") or message.get("reasoning_content")
        if not isinstance(content, str) and not (content is None and may_be_absent):
            found = json_type(content)
            raise Malformed("wrong type", f'{where} ({role}): "content" is a JSON {found}, it must be a string')
        for key, owner in _OWNERS.items():
            if message.get(key) and role != owner:
                raise Malformed(
                    "wrong role", f"{where} ({role}) has {key}, which only the role {owner} may have: move it there"
                )
        if not isinstance(message.get("reasoning_content") or "", str):
            raise Malformed("wrong type", f"{where} ({role}) has reasoning_content that is no string")
        _json_list(message, "tools")
        for call in _json_list(message, "tool_calls"):
            # Only objects may have OpenAI's wrapping: JSON text is rendered as it is.
            function = call if isinstance(message["tool_calls"], str) else call.get("function") or call
            if not isinstance(function, dict) or not {"name", "arguments"} <= function.keys():
                raise Malformed(
                    "tool call", f"{where} ({role}): a tool call needs name and arguments, this one is {shown(call)}"
                )


def check_text(text: str) -> None:
    """Raises ValueError for half of a surrogate pair: it has no UTF-8 form, hence no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which is no valid text: "
            "remove it, or write the whole character"
        ) from error


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a model's reply `<think>reasoning</think><answer>answer</answer>`.

    Any tag may be missing, as in a plain reply or one that is still growing: while `<think>` is open, everything is
    reasoning; without `<think>`, what stands before `</think>` is; the rest is the answer.
    """
    before, opened, inside = text.partition("<think>")
    if opened and before.strip():  # a plain reply that talks about the tag
        return "", text.strip()
    reasoning, closed, answer = (inside if opened else text).partition("</think>")
    if not closed:
        reasoning, answer = (reasoning, "") if opened else ("", reasoning)
    answer = answer.strip()
    if answer.startswith("<answer>"):
        answer = answer.removeprefix("<answer>").partition("</answer>")[0]
    return reasoning.strip(), answer.removesuffix("</answer>").strip()


def _json_list(message: Message, key: str) -> list[dict]:
    """`tools` or `tool_calls`: a list of objects, or the same as JSON text; absent means none."""
    value = message.get(key) or []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # no JSON, nested too deeply, or an integer of 5,000 digits
            raise Malformed("tool call", f"{key} is not valid JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Malformed("tool call", f"{key} must be a list of objects, or the same as JSON text")
    return value


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("tools or tool_calls are nested too deeply") from error
