"""What a table is made of: facts, the ways people ask for them and the ways texts state them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One thing to learn.

    questions: known wordings; one of them is held out for this fact, the others train it.
    answer: the sentence the model shall say; answer_key: the exact string that makes a reply right.
    statements: the same fact as plain text, for pretraining.
    unseen: wordings that no training file ever uses, for any fact.
    always_trained: so many questions at the front are never held out: the bare ones, which people type first.
    pronoun: a question that names the subject only as "it"; needs an earlier turn. Empty: none.
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
            )
            for stems, answer, answer_key, statements in self.rows
        ]
