"""All facts of the base model, in a fixed order."""

from . import chat, countries, culture, english, everyday, geography, history, language, science
from .schema import Fact

TOPICS = (countries, geography, science, culture, history, language, english, everyday, chat)


def all_facts() -> list[Fact]:
    return [fact for topic in TOPICS for table in topic.TABLES for fact in table.facts()]
