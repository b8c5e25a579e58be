"""Talk to a trained model in the terminal, or have it answer questions and count the right ones.

    python eval_model.py --model_mode 1                        # the menu: automatic questions, or your own
    python eval_model.py --model_mode 1 --prompt 你好 --prompt 你是谁？ --seed 42
    python eval_model.py --score dataset/sample/heldout.jsonl  # or several files; last line: held-out score: NN.N %
    python eval_model.py --lora_name lora_identity             # with what train_lora.py has made
    python eval_model.py --load 1 ./MiniMind2                  # a directory in the format of transformers

Reads `{out_dir}/{pretrain,full_sft,rlhf,reason}_{dim}[_moe].pth`, chosen by --model_mode or --weight, and adapters from
`{out_dir}/lora/`; writes nothing. Ctrl-C stops an answer; at the prompt, Ctrl-C, Ctrl-D or an empty line ends the
program. While typing, the arrow keys edit the line and bring back earlier ones, and /help lists the commands.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator

from common.flags import BriefParser, add_bool_flag, non_empty, whole
from inference.flags import add_choice_flags, add_sampling_flags, sampling_params, settle_choice
from inference.scoring import answer_questions, read_questions, score_report
from inference.session import Session
from inference.terminal import LineReader
from model.loading import count_parameters

PRETRAIN_PROMPTS = (
    "马克思主义基本原理",
    "人类大脑的主要功能",
    "万有引力原理是",
    "世界上最高的山峰是",
    "二氧化碳在空气中",
    "地球上最大的动物有",
    "杭州市的美食有",
)
CHAT_PROMPTS = (
    "请介绍一下自己。",
    "你更擅长哪一个学科？",
    "你知道长江吗？",
    "世界上最高的山峰是什么？",
    "万有引力是谁提出的？",
    "海水为什么是咸的？",
    "你知道大熊猫的主要食物是什么吗？",
    "写一段python的快速排序代码",
    "Introduce the history of the United States, please.",
)
LORA_PROMPTS = {
    "lora_identity": ("你好，请介绍一下自己。", "你叫什么名字？", "你是谁训练出来的？"),
    "lora_medical": (
        "我最近经常头晕，可能是什么原因？",
        "孩子发烧到三十九度，应该怎么办？",
        "嗓子疼了三天，需要去医院吗？",
        "吃完海鲜身上起红疹是怎么回事？",
        "晚上总是睡不着，有什么办法？",
        "血压偏高的人平时要注意什么？",
        "扭伤脚踝以后是冷敷还是热敷？",
        "体检发现脂肪肝，饮食上怎么调整？",
    ),
}

HELP = """/lora        正在使用哪个 LoRA，有哪些可选
/lora 名字   换成这个 LoRA；/lora none 不用
/reset       清空历史对话（--history_cnt 大于 0 时才有）
/exit        退出；空行、Ctrl-D 也是
/help        这份说明"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked; adds `params` (SamplingParams) and `choice` (Choice).

    All impossible values are reported at once, with exit code 2, before any work.
    """
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=settle)
    add_choice_flags(parser.add_argument_group("model", "sizes are read from the weights, so seldom needed"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    group = parser.add_argument_group("dialogue")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="answer this and end; may be repeated")
    group.add_argument("--test_mode", type=int, choices=(0, 1), help="skip the menu: 0 automatic questions, 1 typing")
    group.add_argument(
        "--score", type=non_empty, nargs="+", default=[], metavar="FILE",
        help="answer all questions of jsonl files; count right answers, honest refusals and known facts refused",
    )  # fmt: skip
    group.add_argument(
        "--history_cnt", "--historys", type=whole(0, 10**6), default=0,
        help="earlier turns that the model sees, a turn being a question and its answer (%(default)s)",
    )  # fmt: skip
    add_bool_flag(group, "--stream", default=True, help="show an answer while it grows (%(default)s)")
    add_bool_flag(group, "--show_speed", default=True, help="show tokens per second after an answer (%(default)s)")
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> list[str]:
    """Work out what several flags say together (see `parse_args`); returns every problem."""
    if args.max_new_tokens is None:
        args.max_new_tokens = 128 if args.score else 1024
    if args.temperature is None:
        args.temperature = 0.0 if args.score else 0.85
    problems = settle_choice(args)
    try:
        args.params = sampling_params(args)
    except ValueError as error:
        problems.append(str(error))
    if args.score and args.choice.continue_text:
        problems.append("--score asks questions, which a pretrained model cannot answer: use --model_mode 1, 2 or 3")
    return problems


def open_session(args: argparse.Namespace) -> Session:
    """The dialogue that the flags describe. Raises what loading the model, the tokenizer and the adapters raises."""
    for remark in args.choice.remarks:
        print(remark, file=sys.stderr)
    session = Session.open(
        args.choice, args.params, args.device, args.dtype, history_cnt=args.history_cnt, lora_names=args.lora_name
    )
    for remark in session.mismatches(args.choice):
        print(remark, file=sys.stderr)
    print(f"MiniMind模型参数量: {count_parameters(session.model) / 1e6:.2f}M(illion)")
    return session


def answer(session: Session, question: str, *, streaming: bool = True, show_speed: bool = True) -> None:
    """Print the answer to a question, as it grows or at once. Ctrl-C ends it early.

    Raises:
        ValueError: the question cannot be asked, see `Session.ask`.
    """
    start, stopped = time.perf_counter(), False
    reply = session.ask(question)
    print("🤖️: ", end="", flush=True)
    try:
        for piece in reply:
            if streaming:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    seconds = time.perf_counter() - start
    print("" if streaming else reply.text)
    if show_speed:
        note = ", 已停止" if stopped else ", 已到长度上限" if reply.finish_reason == "length" else ""
        print(f"[Speed]: {reply.n_tokens / seconds:.1f} tokens/s ({reply.n_tokens} tokens{note})")
    print(flush=True)


def talk(session: Session, questions: Iterable[str], args: argparse.Namespace) -> int:
    """Answer questions one after the other; returns how many could not be answered."""
    failures = 0
    for question in questions:
        try:
            answer(session, question, streaming=args.stream, show_speed=args.show_speed)
        except ValueError as error:
            print(f"error: {error}\n", file=sys.stderr)
            failures += 1
    return failures


def shown(questions: Iterable[str]) -> Iterator[str]:
    """Pass questions on, printing each as if it had been typed."""
    for question in questions:
        print(f"👶: {question}")
        yield question


def typed(session: Session) -> Iterator[str]:
    """Questions as somebody types them, until /exit, an empty line, Ctrl-D or Ctrl-C; obeys the other commands."""
    lines = LineReader()
    while line := lines.ask("👶: "):
        if not re.match(r"\s*/[a-z]+(\s|$)", line):  # /etc/hosts is no command
            yield line
            continue
        command, *words = line.split()
        if command == "/exit":
            return
        elif command == "/help":
            print(HELP)
        elif command == "/reset":
            session.reset()
            print("已清空历史对话")
        elif command == "/lora":
            choose_lora(session, words)
        else:
            print(f"没有命令 {command}\n{HELP}")


def choose_lora(session: Session, words: list[str]) -> None:
    """Obey `/lora [NAME | none]`, and say which adapter is in use now and which there are."""
    try:
        if words:
            session.use_lora(None if words[0] in ("none", "None") else words[0])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    choices = "、".join([*session.adapters(), "none"])
    print(f"正在使用的 LoRA：{session.lora or '无'}；可选：{choices}（/lora 名字）")


def choose_test_mode() -> int | None:
    """Upstream's menu; asks again until the choice is 0 or 1. None when the user leaves instead."""
    lines = LineReader()
    while (choice := lines.ask("[0] 自动测试\n[1] 手动输入\n")) is not None:
        if choice.strip() in ("0", "1"):
            return int(choice)
        print(f"没有选项 {choice!r}，请输入 0 或 1")
    return None


def run(args: argparse.Namespace) -> int:
    """Score or talk, as the flags say; returns the exit code. Raises ValueError and OSError for what is wrong."""
    questions = [question for path in args.score for question in read_questions(path)]
    session = open_session(args)
    if questions:
        texts = answer_questions(session.model, session.tokenizer, questions, args.params)
        print(score_report(questions, texts))
        return 0
    test_mode = 0 if args.prompt else args.test_mode
    if test_mode is None:
        test_mode = choose_test_mode()
    if test_mode is None:
        if sys.stdin is None or not sys.stdin.isatty():  # a script, which would take silence for success
            raise ValueError("no input: use --prompt TEXT or --test_mode 0")
        return 0
    if test_mode == 1:
        talk(session, typed(session), args)
        return 0
    automatic = PRETRAIN_PROMPTS if session.continue_text else LORA_PROMPTS.get(session.lora, CHAT_PROMPTS)
    return 2 if talk(session, shown(args.prompt or automatic), args) else 0


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 2 for a mistake in flags, files or prompts, 130 for Ctrl-C."""
    args = parse_args(argv)
    try:
        code = run(args)
        print(end="", flush=True)  # here a pipe that nobody reads is noticed
        return code
    except BrokenPipeError:  # nobody reads on, as in `eval_model.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 128 + 13  # what a program gives that SIGPIPE ends
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\n已退出")
        return 130


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a Windows pipe may know no emoji
    sys.exit(main())
