"""What a table is made of: facts, the ways people ask for them and the ways texts state them."""

from dataclasses import dataclass

from .question_wordings import QUESTION_WORDINGS
from .relation_wordings import ALIASES, GUESSED, GUESSES, RELATION_WORDINGS
from .wordings import bare, essence, is_english


@dataclass(frozen=True)
class Fact:
    """One thing to learn.

    questions: known wordings; one of them is held out for this fact, the others train it.
    answer: the sentence the model shall say; answer_key: the exact string that makes a reply right.
    statements: the same fact as plain text, for pretraining.
    unseen: wordings that no training file ever uses, for any fact.
    always_trained: so many questions at the front are never held out: the bare ones, which people type first.
    pronoun: a question that names the subject only as "it"; needs an earlier turn. Empty: none.
    askings: (bare question, name in it) to make training questions of: `questions` and more.
    """

    category: str
    subject: str
    questions: tuple[str, ...]
    answer: str
    answer_key: str
    statements: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    always_trained: int = 0
    follow_up: str = ""
    pronoun: str = ""
    askings: tuple[tuple[str, str], ...] = ()


CHINESE_SUM = str.maketrans("0123456789+", "零一二三四五六七八九加")


def other_names(category: str, subject: str) -> list[str]:
    """A subject as people write it: 湖南省 and 湖南, 《红楼梦》 and 红楼梦, “大” and 大, 第一次世界大战 and 一战."""
    names = [subject, *filter(None, ALIASES.get(subject, "").split("|"))]
    if category.startswith("province"):
        names.append(subject.removesuffix("省").removesuffix("市"))
    elif category in ("author", "poet"):
        names.append(subject.strip("《》"))
    elif category in ("opposite", "word zh to en"):
        names += [f"“{subject}”", f'"{subject}"', f"{subject}这个词"]
    elif category == "opposite (English)":
        names.append(f'"{subject}"')
    elif category == "addition":
        names += [subject.replace("+", "加"), subject.translate(CHINESE_SUM), subject.replace("+", " + ")]
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Relation:
    """A table (subject, value) with templates; `{s}` is the subject and `{v}` the value."""

    category: str
    rows: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]
    unseen: tuple[str, ...]
    answer_key: str = "{v}"
    follow_up: str = ""
    pronoun: str = ""

    def facts(self) -> list[Fact]:
        return [self._fact(subject, value) for subject, value in self.rows]

    def askings(self, subject: str) -> tuple[tuple[str, str], ...]:
        """All training wordings about a subject, known or not: the table's own, and more with every name it has."""
        taken = {essence(template) for template in self.questions + self.unseen}
        more = [line for line in RELATION_WORDINGS.get(self.category, "").split("|") if essence(line) not in taken]
        asked = [(bare(template.format(s=subject)), subject) for template in self.questions]
        for name in other_names(self.category, subject):
            asked += [(line.format(s=name, do=name[:2], it=name[2:]), name) for line in more if line]
            asked += [(guess, name) for guess in self._guesses(subject, name)]
        return tuple(asked)

    def _guesses(self, subject: str, name: str) -> list[str]:
        """法国的首都是巴黎还是柏林: the right value, or any where the subject is unknown, and another, in either order."""
        if self.category not in GUESSES:
            return []
        values = list(dict.fromkeys(value for _, value in self.rows))
        right = values.index(dict(self.rows).get(subject, values[len(name) % len(values)]))
        pair = values[right], values[(right + 1 + len(name)) % len(values)]
        guesses = []
        for x, y in (pair, pair[::-1]):
            guess = GUESSES[self.category].format(s=name, x=x)
            guesses += [form.format(guess=guess, y=y) for form in GUESSED[is_english(guess)]]
        return guesses

    def _fact(self, subject: str, value: str) -> Fact:
        def fill(template: str) -> str:
            return template.format(s=subject, v=value)

        return Fact(
            category=self.category,
            subject=subject,
            questions=tuple(map(fill, self.questions)),
            answer=fill(self.answer),
            answer_key=fill(self.answer_key),
            statements=tuple(map(fill, self.statements)),
            unseen=tuple(map(fill, self.unseen)),
            follow_up=fill(self.follow_up),
            pronoun=fill(self.pronoun),
            askings=self.askings(subject),
        )


ZH_FRAMES = ("{q}", "请问，{q}", "我想知道，{q}", "考考你：{q}", "{q}请简单回答。", "老师问：{q}", "{q}谢谢。")
ZH_UNSEEN_FRAMES = ("有个小朋友问我：{q}", "帮我想一下：{q}")
EN_FRAMES = ("{q}", "Please tell me: {q}", "I have a question. {q}", "{q} Answer briefly.", "Hi! {q}")
EN_UNSEEN_FRAMES = ("My friend wants to know: {q}", "Hey, {q}")


@dataclass(frozen=True)
class Questions:
    """Facts that share no template: each row is (questions, answer, answer_key, further statements).

    The rows' questions are put into common frames ("请问，..."), so that a held-out pair of question and frame is new
    although both its parts are known.
    """

    category: str
    rows: tuple[tuple[tuple[str, ...], str, str, tuple[str, ...]], ...]
    frames: tuple[str, ...] = ZH_FRAMES
    unseen_frames: tuple[str, ...] = ZH_UNSEEN_FRAMES
    answers_are_statements: bool = True

    def facts(self) -> list[Fact]:
        return [
            Fact(
                category=self.category,
                subject=stems[0],
                questions=tuple(frame.format(q=stem) for frame in self.frames for stem in stems),
                answer=answer,
                answer_key=answer_key,
                statements=((answer,) if self.answers_are_statements else ()) + statements,
                always_trained=len(stems),
                unseen=tuple(frame.format(q=stems[0]) for frame in self.unseen_frames),
                askings=tuple((bare(stem), "") for stem in (*stems, *self._more(stems[0]))),
            )
            for stems, answer, answer_key, statements in self.rows
        ]

    @staticmethod
    def _more(stem: str) -> list[str]:
        return list(filter(None, QUESTION_WORDINGS.get(stem, "").split("|")))
