"""eval_model.py from the outside: flags, menu, dialogue, errors; on a random model with the real tokenizer."""

import builtins
import io
import json
import subprocess
import sys

import pytest
import torch

import eval_model
from inference.sampling import SamplingParams
from inference.session import Session
from inference.text import TextStream
from model.LMConfig import LMConfig
from model.loading import REPO_ROOT, load_tokenizer, save_weights, weights_path
from model.model import MiniMindForCausalLM
from model.record import write_record

SHORT = ["--device", "cpu", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(dim=16, n_layers=1)).eval()


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, model):
    """A directory with the weights of the pretraining and of the SFT stage."""
    directory = tmp_path_factory.mktemp("out")
    for name in ("pretrain", "full_sft"):
        path = weights_path(directory, name, model.config)
        save_weights(model.state_dict(), path)
        write_record(path, model.config)
    return directory


@pytest.fixture
def run(out_dir, capsys):
    """Run the program with further flags: (exit code, standard output, standard error)."""

    def run_with(*flags: str) -> tuple[int, str, str]:
        try:
            code = eval_model.main(["--out_dir", str(out_dir), *SHORT, *flags])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run_with


@pytest.fixture
def typing(monkeypatch):
    """Make input() return lines one after the other (an exception is raised instead), then the end of the input."""

    def type_lines(*lines):
        left = iter(lines)

        def typed_line(question: str = "") -> str:
            print(question, end="")
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", typed_line)

    return type_lines


def answers_in(output: str) -> list[str]:
    return [part.split("\n[Speed]")[0] for part in output.split("🤖️: ")[1:]]


# The dialogue


def test_menu_asks_again_and_typing_ends_with_an_empty_line(run, typing):
    """Upstream E1: a wrong choice in the menu was a ValueError."""
    typing("x", "7", "", "1", "你好", "")
    code, out, _ = run()
    assert code == 0
    assert out.count("[0] 自动测试\n[1] 手动输入\n") == 4
    assert out.count("👶: ") == 2 and out.count("🤖️: ") == 1


def test_automatic_questions_need_no_typing(run, typing):
    """Upstream E1: the program could not be scripted."""
    typing()  # any input() is the end of the input
    code, out, _ = run("--test_mode", "0")
    assert code == 0 and out.count("🤖️: ") == len(eval_model.CHAT_PROMPTS)
    assert all(f"👶: {prompt}\n" in out for prompt in eval_model.CHAT_PROMPTS)
    code, out, _ = run("--test_mode", "0", "--model_mode", "0")
    assert code == 0 and all(f"👶: {prompt}\n" in out for prompt in eval_model.PRETRAIN_PROMPTS)


def test_prompts_are_answered_in_order(run):
    code, out, _ = run("--prompt", "一", "--prompt", "二")
    assert code == 0 and out.index("👶: 一\n") < out.index("👶: 二\n") and "[0]" not in out


def test_the_end_of_the_input_ends_politely(run, typing, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for lines in ((), (KeyboardInterrupt(),), ("1",), ("1", KeyboardInterrupt())):
        typing(*lines)
        code, _, err = run()
        assert (code, err) == (0, "")


def test_a_menu_that_nobody_can_answer_is_an_error(run, monkeypatch):
    """With </dev/null the program answered nothing, and called that success."""
    for stdin in (io.StringIO(""), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = run()
        assert (code, err) == (2, "error: no input: use --prompt TEXT or --test_mode 0\n")


def test_streamed_text_equals_the_text_at_once(run):
    """Upstream E2: `--stream ''` crashed, and `--stream False` streamed."""
    outputs = [run("--prompt", "你好", "--seed", "1", "--show_speed", "0", *flags)[1] for flags in (
        [], ["--stream"], ["--stream", "True"], ["--stream", "False"], ["--stream", "0"], ["--stream", ""],
    )]  # fmt: skip
    assert len(set(outputs)) == 1


def test_without_streaming_nothing_is_printed_before_the_end(model, tokenizer, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(TextStream, "push", lambda self, token: seen.append(capsys.readouterr().out) or "x")
    for streaming in (False, True):
        seen.clear()
        capsys.readouterr()
        session = Session(model, tokenizer, SamplingParams(4, temperature=0))
        eval_model.answer(session, "你好", streaming=streaming)
        assert "".join(seen) == ("🤖️: xxx" if streaming else "🤖️: ")


def test_a_seed_makes_answers_reproducible(run):
    """Upstream E4: every prompt had a random seed."""
    first, again, other = (answers_in(run("--prompt", "你好", "--seed", seed)[1]) for seed in ("4", "4", "5"))
    assert first == again != other


def test_tokens_per_second_are_shown_unless_switched_off(run):
    assert " tokens/s (6 tokens, 已到长度上限)" in run("--prompt", "你好", "--seed", "4")[1]
    assert "tokens/s" not in run("--prompt", "你好", "--show_speed", "0")[1]


def test_pretraining_weights_continue_raw_text(run, out_dir, tokenizer, model):
    _, out, _ = run("--model_mode", "0", "--prompt", "长江是", "--temperature", "0")
    ids = [tokenizer.bos_token_id, *tokenizer.encode("长江是", add_special_tokens=False)]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert answers_in(out) == [tokenizer.decode(expected, skip_special_tokens=True)]


@pytest.fixture
def prompts(monkeypatch, tokenizer) -> list[str]:
    """What the model is asked, as text; its answer is always 答."""
    seen = []

    class Answer:
        finish_reason = "stop"

        def __init__(self, model, prompt, params, eos_token_id):
            seen.append(tokenizer.decode(prompt))

        def __iter__(self):
            return iter(tokenizer.encode("答", add_special_tokens=False))

    monkeypatch.setattr("inference.session.stream", Answer)
    return seen


def talk(model, tokenizer, questions, *flags) -> int:
    args = eval_model.parse_args([*SHORT, *flags])
    return eval_model.talk(Session(model, tokenizer, args.params, history_cnt=args.history_cnt), questions, args)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_history_counts_whole_turns(model, tokenizer, prompts, turns):
    """Upstream E5: an odd history_cnt began with the assistant's half of a turn."""
    talk(model, tokenizer, list("甲乙丙丁戊"), "--history_cnt", str(turns))
    expected = "".join(f"<s>user\n{q}</s>\n<s>assistant\n答</s>\n" for q in list("甲乙丙丁")[4 - turns :])
    assert prompts[-1] == expected + "<s>user\n戊</s>\n<s>assistant\n"


def test_history_that_does_not_fit_loses_its_oldest_turns_whole(tokenizer, prompts):
    """Upstream cut the rendered text to its last characters, through the middle of the template."""
    small = MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, max_seq_len=48)).eval()
    talk(small, tokenizer, list("甲乙丙丁戊己庚辛"), "--history_cnt", "9")
    for text in prompts:
        assert text.startswith("<s>user\n") and text.endswith("</s>\n<s>assistant\n")
    assert "甲" in prompts[1] and "甲" not in prompts[-1] and "庚" in prompts[-1]


def test_a_question_that_does_not_fit_is_told_and_the_next_is_answered(tokenizer, capsys):
    """Upstream G3: it was stored as the assistant's answer."""
    small = MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, max_seq_len=48)).eval()
    assert talk(small, tokenizer, ["长" * 100, "你好"], "--history_cnt", "1") == 1
    out, err = capsys.readouterr()
    assert out.count("🤖️: ") == 1 and "42" in err  # 48 less the 6 of the answer


def test_ctrl_c_stops_the_answer_not_the_program(run, typing, monkeypatch):
    tokens = iter([65, KeyboardInterrupt(), 66])

    class Interrupted:
        finish_reason = None

        def __init__(self, *args):
            pass

        def __iter__(self):
            return self

        def __next__(self):
            token = next(tokens, None)
            if token is None:
                self.finish_reason = "stop"
                raise StopIteration
            if isinstance(token, BaseException):
                raise token
            return token

    monkeypatch.setattr("inference.session.stream", Interrupted)
    typing("1", "问", "再问", "")
    code, out, _ = run()
    assert code == 0 and out.count("🤖️: ") == 2
    assert "(1 tokens, 已停止)" in out and "(1 tokens)" in out


# Commands


def test_the_commands_are_obeyed_and_said(run, typing):
    typing("1", "/help", "/reset", "/nonsense", "/lora", "/etc/hosts 是什么？", "/exit", "你好")
    code, out, err = run("--history_cnt", "2")
    assert (code, err) == (0, "")
    assert out.count("🤖️: ") == 1, "only /etc/hosts 是什么？ is a question, and after /exit comes nothing"
    assert out.count("/lora none 不用") == 2, "/help, and for the unknown command"
    assert "没有命令 /nonsense" in out and "已清空历史对话" in out
    assert "正在使用的 LoRA：无；可选：none" in out


def test_reset_forgets_the_turns(run, typing, prompts):
    typing("1", "甲", "/reset", "乙", "丙", "")
    run("--history_cnt", "9")
    assert [prompt.count("<s>user") for prompt in prompts] == [1, 1, 2]


# Input and output that end


def test_a_reader_that_leaves_ends_the_program_quietly(out_dir):
    """`eval_model.py ... | head -1` ended in a traceback of BrokenPipeError."""
    command = [sys.executable, "eval_model.py", "--out_dir", str(out_dir), *SHORT, "--test_mode", "0"]
    process = subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("closed", [["stdin"], ["stdout"], ["stdin", "stdout", "stderr"]])
def test_closed_streams_are_no_traceback(run, monkeypatch, closed):
    """Python has None in their places: `input(): lost sys.stdin`."""
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert run()[0] == 2  # nobody can answer the menu
    assert run("--prompt", "你好")[0] == 0


def test_other_encodings(run, monkeypatch):
    """GBK text under UTF-8 is told, not a traceback; GBK output replaces what it lacks."""
    for encoding, code in (("utf-8", 2), ("gbk", 0)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("1\n你好\n".encode("gbk")), encoding=encoding))
        returned, out, err = run()
        assert returned == code and (code == 0 or "the input is not text in utf-8" in err)
        assert ("[Speed]" in out) == (code == 0)


# Weights and flags


def test_missing_weights_name_the_command_that_makes_them(run):
    code, out, err = run("--model_mode", "2")
    assert code == 2 and out == "" and "Traceback" not in err
    assert "rlhf_512.pth" in err and "python train_dpo.py --out_dir" in err


def test_what_is_no_model_says_what_it_is_for(run, tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    (tmp_path / "m.onnx").write_bytes(b"onnx")
    code, _, err = run("--load", "1", str(tmp_path / "peft"))
    assert code == 2 and "peft: it is a LoRA adapter, no model: eval_model.py takes it with --lora_name" in err
    code, _, err = run("--load", "1", str(tmp_path / "m.onnx"))
    assert code == 2 and "m.onnx: ONNX is for onnxruntime alone: pass the .pth file" in err


@pytest.mark.parametrize("flags", [["--load", "1"], ["--load_from", "MiniMind2"]])
def test_two_flags_that_name_a_model(run, flags):
    """--weight was left unread, and the error was about MiniMind2, which nobody had named."""
    code, _, err = run(*flags, "--weight", "x.pth")
    assert code == 2 and f"--weight x.pth: {flags[0]} says to take MiniMind2 instead; pass only one" in err


def test_weights_of_another_size_name_the_flags(run):
    code, _, err = run("--n_layers", "2", "--prompt", "你好")
    assert code == 2 and "--n_layers 2 contradicts n_layers 1 of" in err and "leave it out" in err


def test_use_moe_false_is_dense(tmp_path):
    """Upstream's type=bool made every `--use_moe False` a MoE."""
    for flags, moe in (
        (["--use_moe", "False"], False),
        (["--use_moe", "0"], False),
        (["--use_moe"], True),
        ([], False),
    ):
        assert eval_model.parse_args(flags).choice.config.use_moe is moe


def test_aliases_of_later_upstream_mean_the_same():
    old = "--dim 64 --n_layers 2 --out_dir x --history_cnt 2 --load 1 dir --repetition_penalty 1.1".split()
    new = "--hidden_size 64 --num_hidden_layers 2 --save_dir x --historys 2 --load_from dir --rp 1.1".split()
    old, new = eval_model.parse_args(old), eval_model.parse_args(new)
    assert (old.params, old.choice.path, old.out_dir, old.history_cnt) == (
        new.params, new.choice.path, new.out_dir, new.history_cnt,
    )  # fmt: skip
    assert (old.dim, old.n_layers) == (new.dim, new.n_layers) == (64, 2)
    assert eval_model.parse_args(["--load_from", "model"]).choice.path.suffix == ".pth"


def test_defaults_are_upstreams():
    args = eval_model.parse_args([])
    assert (args.out_dir, args.model_mode, args.history_cnt, args.stream) == ("out", 1, 0, True)
    assert (args.params.temperature, args.params.top_p) == (0.85, 0.85)
    assert (args.choice.config.dim, args.choice.config.n_layers, args.choice.config.max_seq_len) == (512, 8, 8192)


def test_impossible_flags_are_all_reported_before_any_work(run):
    code, out, err = run("--temperature", "-1", "--dim", "30", "--history_cnt", "-2", "--load", "1", "a", "b")
    assert code == 2 and out == ""
    for words in ("--temperature -1", "dim=30", "--history_cnt -2", "--load 1 a b"):
        assert words in err
    for flags in (["--use_moe", "maybe"], ["--rope_scaling", "yarn"], ["--rope_scaling", "yarn:4"],
                  ["--rope_scaling", "cubic:2"], ["--rope_scaling", "linear:2:512"], ["--rope_scaling", "yarn:4:0"],
                  ["--rope_scaling", "yarn:4:512:1:1"], ["--rope_scaling", "yarn:4:512", "--load", "1"],
                  ["--max_new_tokens", "0"], ["--score", "x", "--model_mode", "0"]):  # fmt: skip
        assert run(*flags)[0] == 2, flags


def test_rope_scaling_reaches_the_model():
    assert eval_model.parse_args(["--rope_scaling", "yarn:4:512"]).choice.config.rope_scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
    }  # fmt: skip
    head = eval_model.parse_args(["--inference_rope_scaling"]).choice.config.rope_scaling
    assert (head["factor"], head["original_max_position_embeddings"]) == (16, 2048)
    assert eval_model.parse_args(["--rope_scaling", "linear:2"]).choice.config.rope_scaling["rope_type"] == "linear"
    upstream = eval_model.parse_args(["--rope_scaling", "yarn:16:2048:1"]).choice.config.rope_scaling
    assert upstream == {**head, "attention_factor": 1.0}


def test_a_device_that_is_not_there_is_told(run):
    code, _, err = run("--device", "cuda:99") if not torch.cuda.is_available() else (2, "", "cuda:99")
    assert code == 2 and "cuda:99" in err


def test_load_1_takes_a_path(run, tmp_path, model, tokenizer, out_dir):
    """Upstream E6: `--load 1` knew only ./MiniMind2."""
    model.save_pretrained(tmp_path / "dir")
    code, _, err = run("--load", "1", str(tmp_path / "dir"))
    assert code == 2 and "tokenizer" in err
    tokenizer.save_pretrained(tmp_path / "dir")
    flags = ("--prompt", "你好", "--temperature", "0", "--show_speed", "0")
    assert run("--load", "1", str(tmp_path / "dir"), *flags)[:2] == run(*flags)[:2]
    code, _, err = run("--load", "1", str(tmp_path / "none"))
    assert code == 2 and "a folder in the format of transformers" in err


def test_scoring_ends_with_the_score(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [
        {"conversations": [{"role": "user", "content": c}], "answer": "没有这个答案", "category": c} for c in "甲乙"
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    code, out, _ = run("--score", str(path))
    assert code == 0 and out.splitlines()[-1] == "held-out score: 0.0 %"
    unknown = tmp_path / "unknown.jsonl"
    row = {"conversations": [{"role": "user", "content": "我叫什么？"}], "unanswerable": True}
    unknown.write_text(json.dumps(row), encoding="utf-8")
    code, out, _ = run("--score", str(path), str(unknown))
    assert code == 0 and out.splitlines()[-3:] == [
        "honest refusals: 0.0 % of 1 unanswerable",
        "known facts refused: 0.0 % of 2",
        "held-out score: 0.0 %",
    ]
    path.write_text("{", encoding="utf-8")
    code, out, err = run("--score", str(path))
    assert code == 2 and "line 1" in err and "Traceback" not in err
    assert run("--score", str(tmp_path / "none.jsonl"))[0] == 2
