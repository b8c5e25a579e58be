"""Fixtures for all tests: the shipped tokenizer, and small jsonl files written on the spot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerBase

from model.chat_format import ChatFormat
from model.loading import load_tokenizer

settings.register_profile("default", deadline=None)  # a busy machine is no failure
settings.load_profile("default")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer()


@pytest.fixture(scope="session")
def chat_format(tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


@pytest.fixture
def write_jsonl(tmp_path) -> Callable[..., Path]:
    """write_jsonl(rows, name) -> path; a row is an object to dump, or bytes that become a line as they are."""

    def write(rows: list, name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, bytes]:
    """The folder of a run stopped after 8 steps with two states, and the bytes of the newest. Nobody changes it."""
    from test_loop import interrupt_at, states  # most tests need nothing of training
    from toy import toy_train

    out = tmp_path_factory.mktemp("trained")
    with pytest.raises(SystemExit):
        toy_train(out, "--save_interval", "4", loss_fn=interrupt_at(7))
    return out, states(out)[0].read_bytes()
