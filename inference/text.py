"""From token ids to text while it grows: whole characters only, and no further than a stop string."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Token ids in, text out, piece by piece, for a byte-level tokenizer.

    A Chinese character or an emoji may be spread over several tokens. Only whole characters come out, and all pieces
    together are exactly `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._pending: list[int] = []  # tokens since the text last ended with a whole character
        self._emitted = 0  # characters of theirs that are out already

    def push(self, token: int) -> str:
        """Take one token; return the text that it completes, often '' in the middle of a character."""
        self._pending.append(token)
        text = self._decode()
        whole = text.rstrip("\ufffd")  # how bytes that are no character, or not yet, are decoded
        piece = whole[self._emitted :]
        self._emitted = len(whole)
        if len(whole) == len(text):
            self._pending, self._emitted = [], 0
        return piece

    def finish(self) -> str:
        """What is left: '' or the replacement characters of a character that was never completed."""
        piece = self._decode()[self._emitted :]
        self._pending, self._emitted = [], 0
        return piece

    def _decode(self) -> str:
        return self.tokenizer.decode(self._pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Text in, text out, until the first of some strings begins; `found` says whether one has.

    What may be the beginning of one is held back until it is clear: with the stop string "END", the pieces "the E",
    "N", "emy" come out as "the ", "", "ENemy".
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.found = stops, False
        self._held = ""

    def push(self, piece: str) -> str:
        """Take a piece; return the text that is certainly before any stop string."""
        text = self._held + piece
        begins = [text.find(stop) for stop in self.stops if stop in text]
        if begins:
            self.found, self._held = True, ""
            return text[: min(begins)]
        kept = self._beginning_at_the_end(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back: it is text after all."""
        text, self._held = self._held, ""
        return text

    def _beginning_at_the_end(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self.stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self.stops):
                return length
        return 0
