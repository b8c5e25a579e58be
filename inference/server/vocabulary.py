"""What each token stands for, as text and as bytes: log-probabilities are told with both."""

from __future__ import annotations

import functools

from transformers import PreTrainedTokenizerBase

LEAST = -9999.0
"""OpenAI's number for the logarithm of a probability of zero: JSON has no infinity."""


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): every byte has a printable character.

    Printable bytes are themselves, and the others follow from character 256 on in order: space is byte 32, the 33rd
    that is not printable, so it is character 256 + 32, "Ġ".
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


class Vocabulary:
    """Tokens as bytes and as text. A token may be a part of a character: its text is then the sign U+FFFD."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer, self._added = tokenizer, {i: t for t, i in tokenizer.get_added_vocab().items()}

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes, or a part of a character's, that a token stands for."""
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the model has more rows than the tokenizer has tokens
            return b""
        alphabet = byte_of_character()
        if all(character in alphabet for character in name):
            return bytes(alphabet[character] for character in name)
        return self._tokenizer.decode([token]).encode()  # of another kind of tokenizer

    def text_of(self, token: int) -> str:
        """The text of a token."""
        return self.bytes_of(token).decode(errors="replace")

    def entry(self, token: int, logprob: float) -> dict:
        """{token, logprob, bytes}, as chat completions tell it."""
        return {"token": self.text_of(token), "logprob": max(logprob, LEAST), "bytes": list(self.bytes_of(token))}

    def chat_logprobs(self, tokens: list[int], logprobs: list[float], tops: list[dict[int, float]]) -> dict:
        """`logprobs` of a chat completion, or of one of its chunks."""
        content = []
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
            likeliest = [self.entry(other, other_logprob) for other, other_logprob in top.items()]
            content.append({**self.entry(token, logprob), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def completion_logprobs(
        self, tokens: list[int], logprobs: list[float | None], tops: list[dict[int, float] | None], offset: int
    ) -> dict:
        """`logprobs` of a completion, or of one of its chunks, whose text begins at character `offset`.

        None instead of a number, as of the first token of a prompt, stays None.
        """
        texts = [self.text_of(token) for token in tokens]
        offsets, told = [], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        for text, logprob, top in zip(texts, logprobs, tops, strict=True):
            if top is None:
                told.append(None)
                continue
            by_text: dict[str, float] = {}
            # Parts of characters may have the same text: the likelier one, which comes first, has the place.
            for other, other_logprob in top.items():
                by_text.setdefault(self.text_of(other), max(other_logprob, LEAST))
            by_text.setdefault(text, max(logprob, LEAST))
            told.append(by_text)
        return {
            "text_offset": offsets,
            "token_logprobs": [None if logprob is None else max(logprob, LEAST) for logprob in logprobs],
            "tokens": texts,
            "top_logprobs": told,
        }
