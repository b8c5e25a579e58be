"""inference/session.py: a dialogue with answers that are stopped, made again, edited and deleted; on a random model."""

import pytest
import torch

from inference.sampling import SamplingParams
from inference.session import Session
from model.LMConfig import LMConfig
from model.loading import load_tokenizer
from model.model import MiniMindForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, max_seq_len=256)).eval()


@pytest.fixture
def prompts(monkeypatch, tokenizer) -> list[str]:
    """What the model is asked, as text."""
    seen = []
    from inference.session import stream

    def recorded(model, prompt, *rest):
        seen.append(tokenizer.decode(prompt))
        return stream(model, prompt, *rest)

    monkeypatch.setattr("inference.session.stream", recorded)
    return seen


@pytest.fixture
def session(model, tokenizer) -> Session:
    return Session(model, tokenizer, SamplingParams(5, seed=3), history_cnt=9)


def read(reply) -> str:
    return "".join(reply)


def test_pieces_are_the_text(session):
    reply = session.ask("你好")
    assert read(reply) == reply.text and (reply.n_tokens, reply.finish_reason) == (5, "length")


def test_an_answer_that_is_stopped_stays_in_the_dialogue(session, prompts):
    reply = session.ask("你好")
    pieces = iter(reply)
    next(pieces)
    reply.stop()
    list(pieces)
    assert (reply.n_tokens, reply.finish_reason) == (1, "stopped")
    session.ask("再见")
    assert f"<s>assistant\n{reply.text}</s>" in prompts[-1]


def test_stopping_an_answer_that_is_complete_changes_nothing(session):
    reply = session.ask("你好")
    read(reply)
    reply.stop()
    assert reply.finish_reason == "length"


def test_regenerating_replaces_the_answer_by_another(session, model, tokenizer, prompts):
    texts = [read(session.ask("你好"))]
    for _ in range(3):
        texts.append(read(session.regenerate()))
    assert len(set(texts)) == 4 and len(session.turns) == 1 and len(set(prompts)) == 1
    repeated = Session(model, tokenizer, SamplingParams(5, seed=3), history_cnt=9)
    assert [read(repeated.ask("你好")), *(read(repeated.regenerate()) for _ in range(3))] == texts
    with pytest.raises(ValueError, match="ask something first"):
        Session(model, tokenizer, SamplingParams(5)).regenerate()


def test_editing_asks_again_from_there(session, prompts):
    for question in "甲乙丙":
        read(session.ask(question))
    read(session.edit(1, "丁"))
    assert [turn.question for turn in session.turns] == ["甲", "丁"]
    assert prompts[-1] == prompts[1].replace("乙", "丁"), "the model sees what came before, and nothing after"


def test_deleting_forgets_question_and_answer(session, prompts):
    answers = [read(session.ask(question)) for question in "甲乙丙"]
    session.delete(1)
    read(session.ask("丁"))
    assert [turn.question for turn in session.turns] == list("甲丙丁")
    assert "乙" not in prompts[-1] and f"丙</s>\n<s>assistant\n{answers[2]}</s>" in prompts[-1]
    for index in (-1, 3):
        with pytest.raises(IndexError, match="has 3"):
            session.delete(index)
        with pytest.raises(IndexError, match="has 3"):
            session.edit(index, "你好")


def test_a_question_that_cannot_be_asked_changes_nothing(session):
    read(session.ask("甲"))
    turns = list(session.turns)
    for ask in (session.ask, lambda text: session.edit(0, text)):
        with pytest.raises(ValueError, match="shorten"):
            ask("长" * 1000)
        assert session.turns == turns


def test_the_system_message_stays_when_turns_are_dropped(model, tokenizer, prompts):
    session = Session(model, tokenizer, SamplingParams(5), system="你是助手", history_cnt=99)
    for number in range(30):
        read(session.ask(f"第{number}个问题是什么"))
    assert prompts[-1].startswith("<s>system\n你是助手</s>\n<s>user\n") and "第0个" not in prompts[-1]
    session.system = ""
    session.ask("你好")
    assert "你是助手" not in prompts[-1]
