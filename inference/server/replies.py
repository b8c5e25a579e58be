"""An answer while it grows -> what the model thinks, what it says, and which tools it calls."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["reasoning", "content", "call"]

THINK, END_OF_THINK = "<think>", "</think>"
ANSWER, END_OF_ANSWER = "<answer>", "</answer>"
CALL, END_OF_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Piece:
    """Some text of an answer. A call of a tool comes whole, without its tags; everything else as it grows."""

    kind: Kind
    text: str


class ReplyParser:
    """Splits `<think>...</think><answer>...</answer>` and `<tool_call>...</tool_call>`, however the text is cut.

    Thinking counts only where the answer begins with it: a reply that talks about the tag is a plain one. Of "<th"
    nothing comes out until it is clear whether it is a tag. Whitespace between tags and text is no part of either.

    Args:
        reasoning: split thinking off; otherwise its tags are ordinary text.
        tools: find calls of tools; otherwise they are ordinary text.
    """

    def __init__(self, *, reasoning: bool = True, tools: bool = False):
        calls = {CALL: "call"} if tools else {}
        thinks = {THINK: "reasoning", ANSWER: "answer"} if reasoning else {}
        # In these states a tag opens the section that it stands for, if nothing but whitespace is before it ...
        self._openings = {"start": {**thinks, **calls}, "between": {ANSWER: "answer", **calls}}
        # ... in these wherever it is ...
        self._tags = {"content": calls, "rest": calls}
        # ... and these go on until their end.
        self._ends = {"reasoning": (END_OF_THINK, "between"), "answer": (END_OF_ANSWER, "rest")}
        self._state, self._after_call = "start", "content"
        self._buffer = ""  # what is not decided yet
        self._space = ""  # whitespace that is left out if nothing follows it
        self._is_trimmed = False  # whether this section's outer whitespace is left out
        self._is_begun = False  # whether this section has text already

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking now."""
        return self._state == "reasoning"

    def push(self, text: str) -> list[Piece]:
        """Take some text; return what is clear now."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._advance(pieces):
            pass
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        """What is left: the beginning of a tag was text after all, and a call without an end is no call."""
        pieces: list[Piece] = []
        left, self._buffer = self._buffer, ""
        if self._state == "call":
            self._enter("content", is_trimmed=False)
            left = CALL + left
        elif self._state == "start":
            self._enter("content", is_trimmed=False)
        self._say(left, pieces)
        if self._space and not self._is_trimmed:
            pieces.append(Piece("content", self._space))
        return _joined(pieces)

    def _advance(self, pieces: list[Piece]) -> bool:
        """Go on to the next tag; False when more text is needed."""
        if self._state in self._openings:
            return self._open()
        if self._state == "call":
            return self._call(pieces)
        if self._state in self._ends:
            end, following = self._ends[self._state]
            is_found = self._read_until([end], pieces) is not None
            if is_found:
                self._enter(following, is_trimmed=True)
            return is_found
        tag = self._read_until(list(self._tags[self._state]), pieces)
        if tag is None:
            return False
        self._after_call = self._state
        self._enter("call", is_trimmed=True)
        return True

    def _open(self) -> bool:
        """At a place where a section may begin."""
        text, openings = self._buffer.lstrip(), self._openings[self._state]
        for tag, state in openings.items():
            if text.startswith(tag):
                self._buffer = text[len(tag) :]
                self._enter(state, is_trimmed=True)
                return True
        if any(tag.startswith(text) for tag in openings):  # may still become one, as the empty text may
            return False
        self._enter("content", is_trimmed=self._state == "between")
        return True

    def _call(self, pieces: list[Piece]) -> bool:
        inside, end, after = self._buffer.partition(END_OF_CALL)
        if not end:
            return False
        pieces.append(Piece("call", inside.strip()))
        self._buffer = after
        self._enter(self._after_call, is_trimmed=True)
        return True

    def _read_until(self, tags: list[str], pieces: list[Piece]) -> str | None:
        """Pass text on up to the first of some tags, and return that; or all that cannot be the beginning of one."""
        places = [(self._buffer.find(tag), tag) for tag in tags if tag in self._buffer]
        if places:
            place, tag = min(places)
            self._say(self._buffer[:place], pieces)
            self._buffer = self._buffer[place + len(tag) :]
            return tag
        kept = 0
        for length in range(1, max(map(len, tags), default=0)):
            if any(tag.startswith(self._buffer[-length:]) for tag in tags):
                kept = min(length, len(self._buffer))
        clear = len(self._buffer) - kept
        self._say(self._buffer[:clear], pieces)
        self._buffer = self._buffer[clear:]
        return None

    def _say(self, text: str, pieces: list[Piece]) -> None:
        """Pass text of the section on, but for whitespace at its end, which waits for what follows it."""
        if self._state == "rest":  # after </answer>
            return
        if self._is_trimmed and not self._is_begun:
            text = text.lstrip()
        text = self._space + text
        holds_space = self._is_trimmed or self._tags.get(self._state)
        said = text.rstrip() if holds_space else text
        self._space = text[len(said) :]
        if said:
            self._is_begun = True
            pieces.append(Piece("reasoning" if self.is_reasoning else "content", said))

    def _enter(self, state: str, is_trimmed: bool) -> None:
        self._state, self._is_trimmed = state, is_trimmed
        self._space, self._is_begun = "", False


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of the same kind become one; calls stay apart."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece.kind == joined[-1].kind != "call":
            joined[-1] = Piece(piece.kind, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined
