"""scripts/chat_openai_api.py: a dialogue in the terminal with a server."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from served import Scripted, served

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "chat_openai_api.py"


@pytest.fixture(scope="module")
def chat():
    spec = importlib.util.spec_from_file_location("chat_openai_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server():
    with served(Scripted("<think>想</think>好的")) as server:
        yield server


@pytest.fixture
def talk(chat, server, monkeypatch, capsys):
    """Type lines, and get (exit code, standard output, standard error)."""

    def talk_with(*lines: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        left = iter(lines)
        monkeypatch.setattr(chat.LineReader, "ask", lambda reader, question: next(left, None))
        try:
            code = chat.main(["--base_url", f"{server.url}/v1", *flags])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return talk_with


def prompts(server, tokenizer, count: int) -> list[str]:
    return [tokenizer.decode(request.prompt) for request in server.engine.requests[-count:]]


def test_the_dialogue_goes_on(talk, server, tokenizer):
    """Upstream copies the empty dialogue each turn (C2)."""
    code, out, _ = talk("一", "二", "/reset", "三")
    first, second, third = prompts(server, tokenizer, 3)
    assert code == 0 and out.count("🤖️: <think>\n想\n</think>\n好的\n") == 3
    assert second.startswith(first) and "好的" in second and "想" not in second and "二" in second
    assert "一" not in third and "三" in third


def test_commands(talk, server, tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"conversations": []}\n')
    lines = ["/system 你是猫", "/temp 0.5", "/temp 9", "/help", "/nothing", "喵", f"/save {file}", "/exit", "不会问到"]
    code, out, err = talk(*lines)
    assert code == 0 and "你是猫" in prompts(server, tokenizer, 1)[0] and "/temp 9: must be" in err
    assert server.engine.requests[-1].params.temperature == 0.5 and "没有命令 /nothing" in out
    saved = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in saved[1]["conversations"]] == ["system", "user", "assistant"]


def test_prompts_as_flags(talk, server):
    code, out, _ = talk(flags=("--prompt", "一", "--temperature", "0", "--stream", "False", "--max_tokens", "9"))
    params = server.engine.requests[-1].params
    assert code == 0 and "👶: 一\n🤖️: 好的" in out and (params.temperature, params.max_new_tokens) == (0, 9)


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(talk, chat, server, tokenizer, monkeypatch):
    printed = print

    def interrupted(*values, **options):
        printed(*values, **options)
        if values and str(values[0]).endswith("好"):
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "print", interrupted, raising=False)
    code, out, _ = talk("一", "二")
    assert code == 0 and "已停止" in out
    assert prompts(server, tokenizer, 1)[0].count("好") == 1, "the half answer is a part of the dialogue"


def test_what_cannot_be_done_is_said_plainly(talk, monkeypatch):
    code, _, err = talk(flags=("--prompt", "一", "--model", "gpt-4"))
    assert code == 2 and "no model 'gpt-4'" in err and "Traceback" not in err
    code, _, err = talk(flags=("--base_url", "http://127.0.0.1:9/v1"))
    assert code == 2 and "serve_openai_api.py" in err
    monkeypatch.setitem(sys.modules, "openai", None)
    code, _, err = talk()
    assert code == 2 and "pip install" in err
