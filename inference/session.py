"""A dialogue with one model: the turns so far, and the answer to the next question as it grows. Prints nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from inference.generation import TokenStream, stream
from inference.models import Choice, load_choice
from inference.sampling import SamplingParams
from inference.text import TextStream
from model.adapters import lora_path, read_lora, saved_adapters
from model.chat_format import ChatFormat, Message
from model.model_lora import Adapter, load_lora, remove_lora
from model.record import adapter_remark, tokenizer_remark

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reply:
    """An answer: iterate over it to get its text piece by piece. `text` and `n_tokens` say what there is so far.

    Whoever stops iterating (Ctrl-C, a closed connection) has a shorter answer, and a dialogue that can go on.
    `stop` does the same from another thread.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: TokenStream):
        self._tokens, self._characters = tokens, TextStream(tokenizer)
        self._is_stopped = False
        self.text, self.n_tokens = "", 0

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            self.n_tokens += 1
            yield self._add(self._characters.push(token))
            if self._is_stopped:
                break
        yield self._add(self._characters.finish())

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece

    def stop(self) -> None:
        """End the answer after the token that is being made."""
        self._is_stopped = True

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "stopped" by `stop`, or None while more may come (see `TokenStream`)."""
        return self._tokens.finish_reason or ("stopped" if self._is_stopped else None)


@dataclasses.dataclass
class Turn:
    """A question, its answer, and how many answers to it were thrown away before this one."""

    question: str
    reply: Reply
    earlier: int = 0


class Session:
    """Questions and answers, one after the other, to a model in evaluation mode.

    Args:
        system: an instruction that stands before the dialogue, '' for none.
        history_cnt: earlier turns that the model sees, always whole ones (upstream E5). What does not fit into the
            context is dropped, oldest first.
        continue_text: the model continues raw text, as after pretraining, instead of answering.
        out_dir: where adapters of LoRA lie, in `lora/`.
        lora_names: adapters to read now, all of which must fit; the first is put into the model. See `use_lora`.

    `params`, `system` and `history_cnt` may be changed between two questions.

    Raises:
        FileNotFoundError, ValueError: an adapter that is missing, damaged, or does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        *,
        system: str = "",
        history_cnt: int = 0,
        continue_text: bool = False,
        out_dir: str = "out",
        lora_names: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.params = model, tokenizer, params
        self.system, self.history_cnt, self.continue_text = system, history_cnt, continue_text
        self.out_dir, self.lora = out_dir, None
        self.turns: list[Turn] = []
        self._format = ChatFormat(tokenizer)
        self._adapters: dict[str, Adapter] = {}
        for name in reversed(lora_names):  # each must fit; the first one stays
            self.use_lora(name)

    @classmethod
    def open(cls, choice: Choice, params: SamplingParams, device: str = "auto", dtype: str = "auto", **settings):
        """A session with the model that `choice` names; `settings` are those of the constructor."""
        model, tokenizer = load_choice(choice, device, dtype)
        settings = {"continue_text": choice.continue_text, "out_dir": choice.out_dir, **settings}
        return cls(model, tokenizer, params, **settings)

    def ask(self, question: str) -> Reply:
        """The answer to a question, which may refer to the turns before.

        Raises:
            ValueError: the question is too long for the context, or no valid text; the dialogue is as it was.
        """
        return self._answer(len(self.turns), question, earlier=0)

    def regenerate(self) -> Reply:
        """Another answer to the last question, in the place of the one there is.

        With a seed in `params` each further answer gets the next seed: the same one would repeat the answer.
        Raises:
            ValueError: nothing was asked yet, or what `ask` raises.
        """
        if not self.turns:
            raise ValueError("there is no answer to make again: ask something first")
        last = self.turns[-1]
        return self._answer(len(self.turns) - 1, last.question, earlier=last.earlier + 1)

    def edit(self, index: int, question: str) -> Reply:
        """The answer to another question in the place of turn `index` (0 is the first); later turns are forgotten.

        Raises:
            IndexError: there is no such turn. ValueError: what `ask` raises; the dialogue is as it was.
        """
        self._check(index)
        return self._answer(index, question, earlier=0)

    def delete(self, index: int) -> None:
        """Forget one turn, question and answer; IndexError if there is no such turn."""
        self._check(index)
        del self.turns[index]

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def history(self, before: int | None = None) -> list[Message]:
        """The messages of the last `history_cnt` turns before turn number `before`, by default of all."""
        turns = self.turns[:before]
        messages = []
        for turn in turns[max(0, len(turns) - self.history_cnt) :]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply.text})
        return messages

    def adapters(self) -> list[str]:
        """The names of the adapters that can be used: those read so far, and those of this size in `{out_dir}/lora`."""
        return sorted({*self._adapters, *saved_adapters(self.out_dir, self.model.config)})

    def use_lora(self, name: str | None) -> None:
        """Put an adapter into the model, in the place of the one that is in; None takes it out.

        Args:
            name: of an adapter in `{out_dir}/lora`, a .pth file, or a directory of peft.

        Raises:
            FileNotFoundError, ValueError: it is missing, damaged, or does not fit; the model stays as it was.
        """
        if name is None:
            remove_lora(self.model)
        else:
            config = self.model.config
            adapter = self._adapters.get(name) or read_lora(lora_path(self.out_dir, name, config), config)
            load_lora(self.model, adapter)
            self._adapters[name] = adapter
        self.lora = name

    def mismatches(self, choice: Choice) -> list[str]:
        """What the records beside the weights say against using them so: another tokenizer, an adapter of others."""
        if choice.config is None:  # a folder has no record
            return []
        remarks = [tokenizer_remark(choice.path, self._format.fingerprint())]
        for name in self._adapters:
            remarks.append(adapter_remark(lora_path(self.out_dir, name, self.model.config), choice.path))
        return [remark for remark in remarks if remark]

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self.turns):
            raise IndexError(f"there is no turn {index}: the dialogue has {len(self.turns)}, the first is 0")

    def _answer(self, index: int, question: str, earlier: int) -> Reply:
        """Ask `question` as turn number `index`, after the turns before it; those from there on are replaced."""
        prompt = self._prompt(index, question)
        params = self.params
        if params.seed is not None and earlier:
            params = dataclasses.replace(params, seed=(params.seed + earlier) % 2**63)
        reply = Reply(self.tokenizer, stream(self.model, prompt, params, self.tokenizer.eos_token_id))
        self.turns[index:] = [Turn(question, reply, earlier)]
        return reply

    def _prompt(self, index: int, question: str) -> list[int]:
        """The token ids that the model is to continue."""
        if self.continue_text:
            return self._format.encode_texts([question])[0][:-1]  # without </s>
        context = self.model.config.max_position_embeddings
        limit = context - min(self.params.max_new_tokens, context // 2)  # leaves room for the answer
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.history(index), {"role": "user", "content": question}]
        return self._format.encode_prompt(messages, max_tokens=limit)
