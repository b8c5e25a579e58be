"""A dialogue with one model: the turns so far, and the answer to the next question as it grows. Prints nothing."""

from collections.abc import Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inference.generation import TextStream, TokenStream, stream
from inference.sampling import SamplingParams
from model.chat_format import ChatFormat, Message
from model.model_lora import Adapter, load_lora, remove_lora


class Reply:
    """An answer: iterate over it to get its text piece by piece. `text` and `n_tokens` say what there is so far.

    Whoever stops iterating (Ctrl-C, a closed connection) has a shorter answer, and a dialogue that can go on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: TokenStream):
        self._tokens, self._characters = tokens, TextStream(tokenizer)
        self.text, self.n_tokens = "", 0

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            self.n_tokens += 1
            yield self._add(self._characters.push(token))
        yield self._add(self._characters.finish())

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", or None while more may come (see `TokenStream`)."""
        return self._tokens.finish_reason


class Session:
    """Questions and answers, one after the other, to a model in evaluation mode.

    Args:
        history_cnt: earlier turns that the model sees, always whole ones (upstream E5). What does not fit into the
            context is dropped, oldest first.
        continue_text: the model continues raw text, as after pretraining, instead of answering.
        adapters: of LoRA, by name, to choose from with `use_lora`; the first is put into the model.

    Raises:
        ValueError: an adapter that does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        *,
        history_cnt: int = 0,
        continue_text: bool = False,
        adapters: dict[str, Adapter] | None = None,
    ):
        self.model, self.tokenizer, self.params = model, tokenizer, params
        self.history_cnt, self.continue_text = history_cnt, continue_text
        self.adapters, self.lora = adapters or {}, None
        self.turns: list[tuple[str, Reply]] = []
        self._format = ChatFormat(tokenizer)
        for name in reversed(self.adapters):  # each must fit; the first one stays
            self.use_lora(name)

    def ask(self, question: str) -> Reply:
        """The answer to a question, which may refer to the turns before.

        Raises:
            ValueError: the question is too long for the context, or no valid text.
        """
        if self.continue_text:
            prompt = self._format.encode_texts([question])[0][:-1]  # without </s>
        else:
            context = self.model.config.max_position_embeddings
            limit = context - min(self.params.max_new_tokens, context // 2)  # leaves room for the answer
            messages = [*self.history(), {"role": "user", "content": question}]
            prompt = self._format.encode_prompt(messages, max_tokens=limit)
        reply = Reply(self.tokenizer, stream(self.model, prompt, self.params, self.tokenizer.eos_token_id))
        self.turns.append((question, reply))
        return reply

    def history(self) -> list[Message]:
        """The messages of the last `history_cnt` turns."""
        kept = self.turns[max(0, len(self.turns) - self.history_cnt) :]
        return [
            message
            for question, reply in kept
            for message in ({"role": "user", "content": question}, {"role": "assistant", "content": reply.text})
        ]

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def use_lora(self, name: str | None) -> None:
        """Put one of `adapters` into the model, in the place of the one that is in; None takes it out.

        Raises:
            KeyError: no adapter has this name. ValueError: it does not fit the model, which stays as it was.
        """
        if name is None:
            remove_lora(self.model)
        else:
            load_lora(self.model, self.adapters[name])
        self.lora = name
