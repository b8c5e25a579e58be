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
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.device import DTYPES, choose_device, fast_dtype
from common.flags import BriefParser, add_bool_flag, non_empty, real, whole
from inference.sampling import PENALTIES, TEMPERATURES, SamplingParams
from inference.scoring import answer_questions, read_questions, score_report
from inference.session import Session
from inference.terminal import LineReader
from model.adapters import lora_path, read_lora, saved_adapters
from model.folders import load_directory
from model.loading import MODEL_MODES, count_parameters, load_model, load_tokenizer
from model.model_flags import TRAINING_FIELDS, add_model_flags, parse_rope_scaling, settle_model

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
    """The flags, checked; adds `params` (SamplingParams) and `transformers_dir` (Path), or, where that is None,
    `config` (LMConfig), `weights` (Path) and `remarks` on both.

    All impossible values are reported at once, with exit code 2, before any work.
    """
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=settle)
    group = parser.add_argument_group("model", "sizes are read from the weights, so seldom needed")
    add_model_flags(group, leave_out=TRAINING_FIELDS)
    group.add_argument(
        "--out_dir", "--save_dir", type=non_empty, default="out", help="directory of the .pth files (%(default)s)"
    )
    group.add_argument(
        "--model_mode", type=int, default=1, choices=MODEL_MODES,
        help="0 pretrain (continues raw text), 1 full_sft, 2 rlhf, 3 reason (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--weight",
        type=non_empty,
        metavar="NAME",
        help="talk to {out_dir}/NAME_{dim}[_moe].pth instead, e.g. full_dist",
    )
    group.add_argument(
        "--load", nargs="+", type=non_empty, default=["0"], metavar=("{0,1}", "PATH"),
        help="0: .pth weights; 1 [PATH]: a transformers directory (./MiniMind2)",
    )  # fmt: skip
    group.add_argument(
        "--lora_name", "--lora_weight", nargs="+", type=non_empty, default=[], metavar="NAME",
        help="adapters in {out_dir}/lora, .pth files, or directories of peft; the first is used",
    )  # fmt: skip
    group.add_argument(
        "--load_from", type=non_empty, metavar="PATH", help="'model': same as --load 0; PATH: same as --load 1 PATH"
    )
    group.add_argument(
        "--max_seq_len", dest="max_position_embeddings", type=whole(16, 2**20), default=argparse.SUPPRESS,
        help="context: prompt and answer, in tokens (the model's own)",
    )  # fmt: skip
    add_bool_flag(
        group, "--inference_rope_scaling", default=False,
        help="same as --rope_scaling yarn:16:2048; upstream's is yarn:16:2048:1",
    )  # fmt: skip
    group.add_argument(
        "--device", type=non_empty, default="auto", help="cpu, cuda, cuda:1, mps; auto takes the fastest (%(default)s)"
    )
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="of weights and arithmetic; auto: bfloat16 or float16 on CUDA, else float32 (%(default)s)",
    )  # fmt: skip

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=real(*TEMPERATURES, or_zero=True), help="0 is greedy (0.85; 0 with --score)"
    )
    group.add_argument("--top_p", type=real(1e-6, 1), default=0.85, help="nucleus mass, 1 is off (%(default)s)")
    group.add_argument("--top_k", type=whole(0, 2**16), default=0, help="candidates kept, 0 is off (%(default)s)")
    group.add_argument(
        "--repetition_penalty", "--rp", type=real(*PENALTIES), default=1.0, help="1 is off (%(default)s)"
    )
    group.add_argument(
        "--max_new_tokens", type=whole(1, 2**20), help="longest answer, without the prompt (1024; 128 with --score)"
    )
    group.add_argument("--seed", type=whole(0, 2**63 - 1), help="makes every answer reproducible; without it they vary")

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
    args.lora_name = [name for name in args.lora_name if name != "None"]  # upstream's default is the text 'None'
    if args.inference_rope_scaling and args.rope_scaling is None:
        args.rope_scaling = parse_rope_scaling("yarn:16:2048")
    args.transformers_dir, problems = None, []
    for name, make in (("params", _params), ("transformers_dir", _transformers_dir)):
        try:
            setattr(args, name, make(args))
        except ValueError as error:
            problems.append(str(error))
    if args.transformers_dir is None:
        settled = settle_model(args, args.weight or MODEL_MODES[args.model_mode])
        args.config, args.weights, args.remarks = settled.config, settled.weights, settled.remarks
        problems += settled.problems
    elif args.rope_scaling:
        problems.append("--rope_scaling is for .pth weights: a transformers directory says it in its config.json")
    if args.score and _continues_text(args):
        problems.append("--score asks questions, which a pretrained model cannot answer: use --model_mode 1, 2 or 3")
    return problems


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed
    )


def _transformers_dir(args: argparse.Namespace) -> Path | None:
    """The directory that --load 1 or --load_from names; None for .pth weights."""
    kind, *path = args.load
    if kind not in ("0", "1") or len(path) > 1 or (kind == "0" and path):
        raise ValueError(f"--load {' '.join(args.load)}: use --load 0, --load 1, or --load 1 PATH")
    if args.load_from not in (None, "model"):
        return Path(args.load_from)
    return Path(path[0] if path else "MiniMind2") if kind == "1" else None


def _continues_text(args: argparse.Namespace) -> bool:
    """Whether the model continues raw text, as after pretraining, instead of answering."""
    return (args.weight or MODEL_MODES[args.model_mode]) == "pretrain"


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode on its device, and its tokenizer.

    Raises:
        FileNotFoundError: weights or directory are missing; names the command that makes them.
        ValueError: they do not fit the flags, or the device is not there.
    """
    device = choose_device(args.device)
    if args.transformers_dir is None:
        for remark in args.remarks:
            print(remark, file=sys.stderr)
        model, tokenizer = load_model(args.config, args.weights), load_tokenizer()
    else:
        model, tokenizer = load_directory(args.transformers_dir)
    dtype = DTYPES.get(args.dtype, torch.float32)
    if args.dtype == "auto" and device.type == "cuda":
        dtype = fast_dtype(device)
    # On a CPU auto means float32: for one row at a time PyTorch's bfloat16 matrix products are no faster there.
    return model.to(device, dtype).eval(), tokenizer


def open_session(args: argparse.Namespace) -> Session:
    """The dialogue that the flags describe. Raises what loading the model, the tokenizer and the adapters raises."""
    model, tokenizer = load(args)
    print(f"MiniMind模型参数量: {count_parameters(model) / 1e6:.2f}M(illion)")
    adapters = {name: read_lora(lora_path(args.out_dir, name, model.config), model.config) for name in args.lora_name}
    settings = {"history_cnt": args.history_cnt, "continue_text": _continues_text(args)}
    return Session(model, tokenizer, args.params, **settings, adapters=adapters)


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


def typed(session: Session, out_dir: str) -> Iterator[str]:
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
            choose_lora(session, words, out_dir)
        else:
            print(f"没有命令 {command}\n{HELP}")


def choose_lora(session: Session, words: list[str], out_dir: str) -> None:
    """Obey `/lora [NAME | none]`, and say which adapter is in use now and which there are."""
    config = session.model.config
    try:
        if words and words[0] in ("none", "None"):
            session.use_lora(None)
        elif words:
            if words[0] not in session.adapters:
                session.adapters[words[0]] = read_lora(lora_path(out_dir, words[0], config), config)
            session.use_lora(words[0])
    except (ValueError, OSError) as error:
        session.adapters.pop(words[0], None)
        print(f"error: {error}", file=sys.stderr)
    names = sorted({*session.adapters, *saved_adapters(out_dir, config)})
    print(f"正在使用的 LoRA：{session.lora or '无'}；可选：{'、'.join([*names, 'none'])}（/lora 名字）")


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
        talk(session, typed(session, args.out_dir), args)
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
