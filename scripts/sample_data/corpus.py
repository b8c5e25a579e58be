"""From facts to pretraining texts, conversations and held-out questions."""

import random
from collections import defaultdict
from collections.abc import Iterable

from .schema import Fact, Relation, other_names
from .unknown_names import unknown_names
from .unknown_questions import HELD_OUT_KINDS, KINDS, NOT_LEARNED, NOT_LEARNED_EN
from .wordings import essence, worded

# Wordings of a fact in the training part: of a table's fact, and of one that shares its wordings with no other.
WORDINGS_PER_FACT = 18
WORDINGS_PER_QUESTION = 26
TEXTS_PER_FACT = 2  # questions with their answers in the pretraining texts
# Names that no table knows, to ask about in a table's wordings: so many, and so many more for each of its facts.
UNKNOWN_NAMES, UNKNOWN_NAMES_PER_FACT, HELD_OUT_NAMES = 60, 2, 5
UNKNOWN_QUESTIONS = 1200
UNKNOWN_FOLLOW_UPS = 200
FOLLOW_UPS = 2  # training conversations that end with the follow-up question about a fact
# One fact in so many is also asked in a wording that no training file uses, or as the follow-up of another turn.
UNSEEN_WORDING_EVERY = 7
FOLLOW_UP_EVERY = 8
PRONOUN_EVERY = 8

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


def questions(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


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


class Asker:
    """Asks in ever new wordings, never twice in the same and never in a held-out one.

    Two questions count as the same if they differ only in marks, spaces and capital letters.
    """

    def __init__(self, held_out: Iterable[str], rng: random.Random):
        self.taken = set(map(essence, held_out))
        self.rng = rng

    def ask(self, askings: tuple[tuple[str, str], ...]) -> str | None:
        """A new question made of one of `askings`; None where twenty attempts gave none."""
        for _ in range(20):
            body, name = self.rng.choice(askings)
            question = worded(body, name, self.rng)
            if essence(body) not in self.taken and essence(question) not in self.taken and essence(question):
                return question
        return None

    def ask_anew(self, askings: tuple[tuple[str, str], ...], count: int) -> list[str]:
        """Up to `count` questions, all different."""
        asked = {}
        for _ in range(count):
            if question := self.ask(askings):
                asked[question] = None
        return list(asked)


def pretraining_texts(facts: list[Fact], asker: Asker, rng: random.Random) -> list[str]:
    """Every statement alone, short passages (facts about one subject, facts of one table), questions with answers."""
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
    texts += [f"{asked} {fact.answer}" for fact in facts for asked in asker.ask_anew(fact.askings, TEXTS_PER_FACT)]
    texts = list(dict.fromkeys(texts))
    rng.shuffle(texts)
    return texts


def passage(facts: list[Fact], rng: random.Random) -> str:
    statements = [rng.choice(fact.statements) for fact in facts]
    return (" " if statements[0].isascii() else "").join(statements)


def held_out_questions(facts: list[Fact], rng: random.Random) -> list[dict]:
    """Every fact in its held-out wording, some in wordings never trained, and as later turns of a conversation."""
    split = split_questions(facts)
    rows = [held_out_row([user(unknown)], fact, fact.category) for fact, (_, unknown) in split.items()]
    for i, fact in enumerate(facts):
        if i % UNSEEN_WORDING_EVERY == 0:
            wording = fact.unseen[(i // UNSEEN_WORDING_EVERY) % len(fact.unseen)]
            rows.append(held_out_row([user(wording)], fact, "unseen wording"))
    for asked_for, kind in ((follow_ups(facts)[1], "follow-up"), (pronouns(facts)[1], "pronoun")):
        for others, fact, question in asked_for:
            other = rng.choice(others)
            messages = turns((other, rng.choice(split[other][0]))) + [user(question)]
            rows.append(held_out_row(messages, fact, kind))
    return rows


LaterTurn = tuple[list[Fact], Fact, str]  # facts of which one is asked first, the fact asked for then, and how


def follow_ups(facts: list[Fact]) -> tuple[list[LaterTurn], list[LaterTurn]]:
    """(trained, held out): 那日本的首都呢？ after a question about another fact of the table."""
    trained, held_out = [], []
    for group in by_category(facts).values():
        for i, fact in enumerate(group):
            if fact.follow_up:
                others = [other for other in group if other is not fact]
                (held_out if i % FOLLOW_UP_EVERY == 3 else trained).append((others, fact, fact.follow_up))
    return trained, held_out


def pronouns(facts: list[Fact]) -> tuple[list[LaterTurn], list[LaterTurn]]:
    """(trained, held out): 它的首都是哪里？ after a question about the same subject."""
    subjects = defaultdict(list)
    for fact in facts:
        subjects[fact.subject].append(fact)
    related = [(first, fact) for group in subjects.values() for first in group for fact in group]
    related = [(first, fact) for first, fact in related if fact.pronoun and first.category != fact.category]
    trained, held_out = [], []
    for i, (first, fact) in enumerate(related):
        (held_out if i % PRONOUN_EVERY == 5 else trained).append(([first], fact, fact.pronoun))
    return trained, held_out


Unknown = list[tuple[Relation, str]]  # names that no table knows, each with the table whose questions it is put into


def unknown_subjects(tables: list[Relation], rng: random.Random) -> tuple[Unknown, Unknown]:
    """(trained, held out): many names for every table, and a few others."""
    taken = {name for table in tables for subject, _ in table.rows for name in other_names(table.category, subject)}

    def draw(table: Relation, count: int) -> Unknown:
        subjects = [subject for subject, _ in table.rows]
        return [(table, name) for name in unknown_names(table.category, subjects, taken, count, rng)]

    held_out = [pair for table in tables for pair in draw(table, HELD_OUT_NAMES)]
    taken |= {variant for table, name in held_out for variant in other_names(table.category, name)}
    trained = []
    for table in tables:
        trained += draw(table, UNKNOWN_NAMES + UNKNOWN_NAMES_PER_FACT * len(table.rows))
    return trained, held_out


def refusal_of(table: Relation) -> str:
    return NOT_LEARNED_EN if "(English)" in table.category else NOT_LEARNED


def unanswerable_questions(unknown: Unknown, rng: random.Random) -> list[dict]:
    """Held-out questions that nobody could answer: names never trained, and kinds of question never trained."""
    asked = {}
    for table, name in unknown:
        asked[rng.choice(table.questions).format(s=name)] = f"unknown name: {table.category}"
    for kind, wordings in HELD_OUT_KINDS:
        for wording in wordings.split("|"):
            asked[wording + ("?" if wording.isascii() else "？")] = f"unknown kind: {kind}"
    return [
        {"conversations": [user(question)], "unanswerable": True, "category": category}
        for question, category in asked.items()
    ]


def refusals(unknown: Unknown, asker: Asker, rng: random.Random) -> list[list[dict]]:
    """Training conversations about what the corpus does not know."""
    rows = []
    for table, name in unknown:
        if question := asker.ask(table.askings(name)):
            rows.append([user(question), assistant(refusal_of(table))])
    composed = [(question, kind.reply) for kind in KINDS if kind.fills for question in kind.questions()]
    single = [(question, kind.reply) for kind in KINDS if not kind.fills for question in kind.questions()]
    for body, reply in single * 3 + rng.sample(composed, UNKNOWN_QUESTIONS):
        if question := asker.ask(((body, ""),)):
            rows.append([user(question), assistant(reply)])
    return rows


def conversations(facts: list[Fact], unknown: Unknown, asker: Asker, rng: random.Random) -> list[list[dict]]:
    """Training conversations; no held-out question of a fact and no held-out name occurs in them."""
    split = split_questions(facts)
    training = []
    for fact, (known, _) in split.items():
        count = WORDINGS_PER_QUESTION if fact.always_trained else WORDINGS_PER_FACT
        first, rest = known[: fact.always_trained], known[fact.always_trained :]
        asked = [*first, *rng.sample(rest, min(len(rest), 6 - len(first)))]
        asked += asker.ask_anew(fact.askings, count - len(asked))
        training += [turns((fact, question)) for question in asked]
    refused = refusals(unknown, asker, rng)
    training += refused

    def ask(fact: Fact) -> list[dict]:
        return turns((fact, asker.ask(fact.askings) or rng.choice(split[fact][0])))

    for others, fact, question in (follow_ups(facts)[0] + pronouns(facts)[0]) * FOLLOW_UPS:
        training.append(ask(rng.choice(others)) + turns((fact, question)))
    groups = by_category(facts)
    for table, name in rng.sample(unknown, UNKNOWN_FOLLOW_UPS):
        if table.follow_up:
            refused_turn = [user(table.follow_up.format(s=name)), assistant(refusal_of(table))]
            training.append(ask(rng.choice(groups[table.category])) + refused_turn)
    small_talk = [fact for fact in facts if fact.category in ("small talk", "identity")]
    for _ in range(100):
        training.append(
            [*ask(rng.choice(small_talk)), *(m for f in rng.sample(facts, rng.randint(1, 3)) for m in ask(f))]
        )
    for _ in range(150):
        first, second = rng.sample([ask(rng.choice(facts)), ask(rng.choice(facts)), rng.choice(refused)], 2)
        training.append([*first, *second])
    for _ in range(60):
        system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
        training.append([system, *(ask(rng.choice(facts)) if rng.random() < 0.7 else rng.choice(refused))])

    answers: dict[tuple[str, ...], str] = {}  # what was asked, and then said: one question has one answer
    kept = []
    for messages in training:
        asked = tuple(essence(m["content"]) for m in messages[:-1] if m["role"] != "system")
        if answers.setdefault(asked, messages[-1]["content"]) == messages[-1]["content"]:
            kept.append(messages)
    unique = list({str(messages): messages for messages in kept}.values())
    rng.shuffle(unique)
    return unique
