"""All facts of the base model, in a fixed order."""

from . import chat, countries, culture, english, everyday, geography, history, language, science
from .schema import Fact, Questions, Relation

TOPICS = (countries, geography, science, culture, history, language, english, everyday, chat)


def all_tables() -> list[Relation | Questions]:
    return [table for topic in TOPICS for table in topic.TABLES]


def all_facts() -> list[Fact]:
    return [fact for table in all_tables() for fact in table.facts()]
