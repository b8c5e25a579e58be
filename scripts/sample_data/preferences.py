"""Pairs for DPO: a right and friendly answer against one that is wrong, rude, beside the point or stuck."""

import random

from .corpus import assistant, split_questions, user
from .schema import Fact, Relation
from .tables import TOPICS, all_facts
from .wordings import is_english

RUDE_ZH = ("这都不知道，自己去查。", "别烦我，不想回答。", "问这种问题，真无聊。", "懒得理你。")
RUDE_EN = ("Look it up yourself.", "What a stupid question.", "Leave me alone.", "I do not care.")
KINDS = ("wrong fact", "wrong fact", "rude", "off-topic", "repetition")


def wrong_answers() -> dict[Fact, list[str]]:
    """For every fact of a table its sentence with the value of another row, e.g. 法国的首都是柏林。"""
    wrong = {}
    for topic in TOPICS:
        for table in topic.TABLES:
            if isinstance(table, Relation):
                values = list(dict.fromkeys(value for _, value in table.rows))
                for fact, (subject, value) in zip(table.facts(), table.rows, strict=True):
                    wrong[fact] = [table.answer.format(s=subject, v=other) for other in values if other != value]
    return wrong


def chosen_answer(fact: Fact) -> str:
    return f"{fact.answer} Is there anything else?" if is_english(fact.answer) else f"{fact.answer}还想知道别的吗？"


def rejected_answer(fact: Fact, kind: str, wrong: list[str], facts: list[Fact], rng: random.Random) -> str:
    if kind == "wrong fact":
        return rng.choice(wrong)
    if kind == "rude":
        return rng.choice(RUDE_EN if is_english(fact.answer) else RUDE_ZH)
    if kind == "off-topic":
        return rng.choice([other for other in facts if other.category != fact.category]).answer
    return (" " if is_english(fact.answer) else "").join([fact.answer] * 4)


def preference_pairs(count: int, held_out: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """`count` pairs to train on and `held_out` pairs about other facts."""
    facts, wrong = all_facts(), wrong_answers()
    split = split_questions(facts)
    asked = rng.sample(list(wrong), count + held_out)
    pairs = []
    for i, fact in enumerate(asked):
        question = user(rng.choice(split[fact][0]))
        rejected = rejected_answer(fact, KINDS[i % len(KINDS)], wrong[fact], facts, rng)
        pairs.append(
            {"chosen": [question, assistant(chosen_answer(fact))], "rejected": [question, assistant(rejected)]}
        )
    return pairs[:count], pairs[count:]
