"""How many questions does a chat model answer right, and does it say so when it cannot know?

A file of questions has one JSON object a line:
`{"conversations": [{"role": "user", "content": ...}], "answer": "the fact", "answers": [others], "category": "..."}`,
where earlier turns, `answers` and `category` are optional. A question that the model cannot know has
`"unanswerable": true` instead of answers: right is then a reply that admits it, by one of REFUSALS.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from common.jsonl import parse_object, strip_line
from inference.generation import generate
from inference.sampling import SamplingParams
from model.chat_format import ChatFormat, Message, check_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a reply says that admits ignorance; compared after `normalize`.
REFUSALS = ("我不知道", "i don't know", "i do not know")


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user's question, and the facts of which one must occur in the answer.

    No answers: a question that the model cannot know.
    """

    messages: list[Message]
    answers: list[str]
    category: str = ""

    @property
    def text(self) -> str:
        """The question itself, without earlier turns."""
        return self.messages[-1]["content"]


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a jsonl file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no question (file, line number, reason), or no questions at all.
    """
    questions = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line := strip_line(line):
                    questions.append(parse_question(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise ValueError(f"{path} holds no questions: one JSON object a line, with 'conversations' and 'answer'")
    return questions


def parse_question(line: bytes) -> Question:
    """A line of a question file; ValueError says what is wrong with it."""
    record = parse_object(line)
    messages = record.get("conversations")
    if not isinstance(messages, list):
        raise ValueError("the line must be an object with a list 'conversations'")
    check_messages(messages, "'conversations'")
    if messages[-1]["role"] != "user" or not messages[-1]["content"]:
        raise ValueError(f"the last message is of role {messages[-1]['role']!r}: it must be a user's, with content")
    category = str(record.get("category", ""))
    if record.get("unanswerable", False) is True:
        if "answer" in record or "answers" in record:
            raise ValueError("an 'unanswerable' question has no 'answer' and no 'answers'")
        return Question(messages, [], category)
    more = record.get("answers", [])
    if not isinstance(more, list):
        raise ValueError("'answers' must be a list of strings")
    answers = [record.get("answer"), *more]
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("'answer' and all 'answers' must be strings that are not empty")
    return Question(messages, answers, category)


def follows_reasoning_format(text: str) -> bool:
    """True if a reply is `<think>...</think>`, then `<answer>...</answer>`, each tag once and nothing around them.

    So a reply that was cut off, or that thinks without answering, does not follow the format.
    """
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    pattern = r"\s*<think>\s*\S.*</think>\s*<answer>\s*\S.*</answer>\s*"
    return once and re.fullmatch(pattern, text, flags=re.DOTALL) is not None


def normalize(text: str) -> str:
    """Full-width and other compatibility forms to their plain ones (NFKC), and case folded."""
    return unicodedata.normalize("NFKC", text).casefold()


def is_right(text: str, answers: Iterable[str]) -> bool:
    """True where one of `answers` occurs in `text`, whatever the case and width.

    Numbers and words in Latin letters must stand alone: 12 is not in 112, 3.12, 12.5 or -12, and Fe is not in coffee.
    """
    text = normalize(text)
    return any(re.search(_standing_alone(normalize(answer.strip())), text) for answer in answers)


def is_refusal(text: str) -> bool:
    """True where a reply admits that it does not know."""
    text = normalize(text).replace("’", "'")
    return any(refusal in text for refusal in REFUSALS)


def _standing_alone(answer: str) -> str:
    """A regular expression for `answer` that does not match inside a longer number or Latin word."""
    before = after = ""
    if re.match(r"\d", answer):
        before = r"(?<!\d)(?<!\d\.)(?<!-)"
    elif re.match("[a-z]", answer):
        before = "(?<![a-z])"
    if re.search(r"\d$", answer):
        after = r"(?!\d)(?!\.\d)"
    elif re.search("[a-z]$", answer):
        after = "(?![a-z])"
    return before + re.escape(answer) + after


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    params: SamplingParams,
    batch_size: int = 32,
) -> list[str | None]:
    """The model's answers as text, in the order of the questions; None for one that does not fit into its context."""
    chat_format = ChatFormat(tokenizer)
    limit = model.config.max_position_embeddings - 1
    prompts = {}
    for i, question in enumerate(questions):
        with suppress(ValueError):
            prompts[i] = chat_format.encode_prompt(question.messages, max_tokens=limit)
    answers = generate(model, list(prompts.values()), params, tokenizer.eos_token_id, max_rows=batch_size)
    texts = [None] * len(questions)
    for i, tokens in zip(prompts, answers, strict=True):
        texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
    return texts


def score_report(questions: list[Question], texts: list[str | None], show_wrong: int = 10) -> str:
    """A table by category, up to `show_wrong` wrong answers, and as the last line `held-out score: NN.N %`.

    That score is of the questions with answers. If any question cannot be answered, the lines before it say how many
    of these were refused honestly, and how many questions with an answer were refused too. The percentages of what is
    right are rounded down: 94.96 % is not 95.0 %; that of known facts refused is rounded up. If any reply thinks, a
    line says how many of all replies follow the format of reasoning.

    A question that could not be asked (None) counts as wrong, and a line before the last says how many there are.
    """
    not_asked = texts.count(None)
    texts = [text or "" for text in texts]
    refused = [is_refusal(text) for text in texts]
    right = [
        is_right(text, question.answers) if question.answers else refusal
        for question, text, refusal in zip(questions, texts, refused, strict=True)
    ]
    lines = ["  right   total        %   category"]
    for category in sorted({question.category for question in questions}):
        hits = [hit for hit, question in zip(right, questions, strict=True) if question.category == category]
        lines.append(f"{sum(hits):7d} {len(hits):7d} {_percent(hits):8.1f}   {category or '-'}")
    wrong = [i for i, hit in enumerate(right) if not hit]
    if wrong:
        lines.append(f"\nwrong answers, {min(show_wrong, len(wrong))} of {len(wrong)}:")
    for i in wrong[:show_wrong]:
        expected = " / ".join(questions[i].answers) or "(cannot be known)"
        lines += [f"👶: {questions[i].text}", f"🤖️: {texts[i]}", f"    -> {expected}"]
    if any("<think>" in text for text in texts):
        lines.append(f"tags obeyed: {_percent([follows_reasoning_format(text) for text in texts]):.1f} %")
    if not_asked:
        lines.append(f"{not_asked} of {len(texts)} questions are too long for the model's context and count as wrong")
    known = [i for i, question in enumerate(questions) if question.answers]
    unknown = [i for i, question in enumerate(questions) if not question.answers]
    if unknown:
        lines.append(f"honest refusals: {_percent([refused[i] for i in unknown]):.1f} % of {len(unknown)} unanswerable")
    if unknown and known:
        answered = _percent([not refused[i] for i in known])
        lines.append(f"known facts refused: {100 - answered:.1f} % of {len(known)}")
    if known:
        lines.append(f"held-out score: {_percent([right[i] for i in known]):.1f} %")
    return "\n".join(lines)


def _percent(hits: list[bool]) -> float:
    return sum(hits) * 1000 // len(hits) / 10
