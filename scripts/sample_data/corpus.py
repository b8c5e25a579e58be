"""From facts to pretraining texts, conversations and held-out questions."""

import random
from collections import defaultdict
from collections.abc import Iterable

from .schema import Fact

TRAINING_QUESTIONS_PER_FACT = 6
# One fact in so many is also asked in a wording that no training file uses, or as the follow-up of another turn.
UNSEEN_WORDING_EVERY = 7
FOLLOW_UP_EVERY = 8
PRONOUN_EVERY = 8

# Put before some training questions of the tables, so that an opening nobody foresaw does not confuse the model.
OPENINGS_ZH = ("你好，", "帮帮我：", "再问一个：")
OPENINGS_EN = ("Hello! ", "One more question. ")
OPENINGS_SHARE = 0.2

SYSTEM_PROMPTS = (
    "你是一个友好的小助手。",
    "请用一句话回答用户的问题。",
    "你是一位耐心的老师。",
    "You are a helpful assistant.",
)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def turns(*facts_and_questions: tuple[Fact, str]) -> list[dict]:
    return [message for fact, question in facts_and_questions for message in (user(question), assistant(fact.answer))]


def by_category(facts: Iterable[Fact]) -> dict[str, list[Fact]]:
    groups = defaultdict(list)
    for fact in facts:
        groups[fact.category].append(fact)
    return groups


def split_questions(facts: list[Fact]) -> dict[Fact, tuple[list[str], str]]:
    """For every fact its training questions and the one held out.

    The position of the held-out question moves through the table: a template held out for one fact trains its
    neighbours, so that only the pair is new to the model.
    """
    split = {}
    for group in by_category(facts).values():
        for i, fact in enumerate(group):
            choices = len(fact.questions) - fact.always_trained
            held_out = fact.always_trained + (3 * i + i // choices) % choices
            training = [question for k, question in enumerate(fact.questions) if k != held_out]
            split[fact] = (training, fact.questions[held_out])
    return split


def single_turns(facts: list[Fact], held_out: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Every question of every fact but `held_out` of them, which come back as held-out rows."""
    split = split_questions(facts)
    rows = [{"conversations": turns((fact, question))} for fact, (known, _) in split.items() for question in known]
    asked = rng.sample(list(split), min(held_out, len(split)))
    rows += [{"conversations": turns((fact, split[fact][1]))} for fact in split if fact not in asked]
    rng.shuffle(rows)
    return rows, [held_out_row([user(split[fact][1])], fact, fact.category) for fact in asked]


def held_out_row(messages: list[dict], fact: Fact, category: str) -> dict:
    return {"conversations": messages, "answer": fact.answer_key, "category": category}


def opened(question: str, rng: random.Random) -> str:
    if rng.random() >= OPENINGS_SHARE:
        return question
    return rng.choice(OPENINGS_EN if question.isascii() else OPENINGS_ZH) + question


def pretraining_texts(facts: list[Fact], rng: random.Random) -> list[str]:
    """Every statement alone, then short passages: facts about one subject, and facts of one table."""
    texts = [statement for fact in facts for statement in fact.statements]

    subjects = defaultdict(list)
    for fact in facts:
        subjects[fact.subject].append(fact)
    for group in subjects.values():
        if len(group) > 1:
            for _ in range(2):
                texts.append(passage(rng.sample(group, len(group)), rng))

    for group in by_category(facts).values():
        for _ in range(2):
            shuffled = rng.sample(group, len(group))
            while shuffled:
                size = rng.randint(3, 6)
                texts.append(passage(shuffled[:size], rng))
                del shuffled[:size]
    texts = list(dict.fromkeys(texts))
    rng.shuffle(texts)
    return texts


def passage(facts: list[Fact], rng: random.Random) -> str:
    statements = [rng.choice(fact.statements) for fact in facts]
    return (" " if statements[0].isascii() else "").join(statements)


def conversations(facts: list[Fact], rng: random.Random) -> tuple[list[list[dict]], list[dict]]:
    """Training conversations and held-out rows; no held-out list of user turns occurs in the training part."""
    split = split_questions(facts)
    training, held_out = [], []
    for fact, (known, unknown) in split.items():
        first, rest = known[: fact.always_trained], known[fact.always_trained :]
        questions = first + rng.sample(rest, min(len(rest), TRAINING_QUESTIONS_PER_FACT - len(first)))
        training += [turns((fact, opened(question, rng) if fact.follow_up else question)) for question in questions]
        held_out.append(held_out_row([user(unknown)], fact, fact.category))
    for i, fact in enumerate(facts):
        if i % UNSEEN_WORDING_EVERY == 0:
            wording = fact.unseen[(i // UNSEEN_WORDING_EVERY) % len(fact.unseen)]
            held_out.append(held_out_row([user(wording)], fact, "unseen wording"))

    def ask(fact: Fact) -> tuple[Fact, str]:
        return fact, rng.choice(split[fact][0])

    for group in by_category(facts).values():
        for i, fact in enumerate(group):
            if not fact.follow_up:
                continue
            other = rng.choice([candidate for candidate in group if candidate is not fact])
            if i % FOLLOW_UP_EVERY == 3:
                messages = turns(ask(other)) + [user(fact.follow_up)]
                held_out.append(held_out_row(messages, fact, "follow-up"))
            else:
                training.append(turns(ask(other), (fact, fact.follow_up)))

    subjects = defaultdict(list)
    for fact in facts:
        subjects[fact.subject].append(fact)
    related = [(first, fact) for group in subjects.values() for first in group for fact in group]
    related = [(first, fact) for first, fact in related if fact.pronoun and first.category != fact.category]
    for i, (first, fact) in enumerate(related):
        if i % PRONOUN_EVERY == 5:
            held_out.append(held_out_row(turns(ask(first)) + [user(fact.pronoun)], fact, "pronoun"))
        else:
            training.append(turns(ask(first), (fact, fact.pronoun)))

    small_talk = [fact for fact in facts if fact.category in ("small talk", "identity")]
    for _ in range(100):
        chosen = rng.sample(facts, rng.randint(1, 3))
        training.append(turns(ask(rng.choice(small_talk)), *map(ask, chosen)))
    for _ in range(60):
        system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
        training.append([system, *turns(ask(rng.choice(facts)))])

    rng.shuffle(training)
    return training, held_out
