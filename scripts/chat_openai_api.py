"""Talk in the terminal to a server with OpenAI's interface: serve_openai_api.py, or any other.

    python scripts/chat_openai_api.py                                            # http://127.0.0.1:8998/v1
    python scripts/chat_openai_api.py --base_url http://127.0.0.1:9000/v1 --model minimind:lora_identity
    python scripts/chat_openai_api.py --prompt 你好 --prompt 你是谁？ --temperature 0 # answers and ends

The dialogue goes on from question to question. Ctrl-C stops an answer; at the prompt, Ctrl-C, Ctrl-D or an empty line
ends the program, and /help lists the commands. Needs OpenAI's Python package: pip install "openai>=1.66,<4"
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.flags import BriefParser, add_bool_flag, non_empty, plain_errors, real, whole  # noqa: E402
from inference.terminal import LineReader  # noqa: E402

HELP = """/reset         清空历史对话
/system 文字   换系统提示词（并清空历史）；/system 去掉它
/temp 数字     换温度，0 总是取最可能的词
/save 文件     把对话存成训练数据的一行（.jsonl，接在后面）
/exit          退出；空行、Ctrl-D 也是
/help          这份说明"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base_url", type=non_empty, default="http://127.0.0.1:8998/v1", help="of the server (%(default)s)"
    )
    parser.add_argument(
        "--api_key", type=non_empty, default=os.environ.get("OPENAI_API_KEY", "none"),
        help="its key, if it wants one; by default the environment variable OPENAI_API_KEY",
    )  # fmt: skip
    parser.add_argument("--model", type=non_empty, help="which of its models (the first)")
    parser.add_argument("--system", default="", help="an instruction that stands before the dialogue")
    parser.add_argument("--temperature", type=real(0, 2), help="0 is greedy (the server's)")
    parser.add_argument("--top_p", type=real(0, 1), help="nucleus mass, 1 is off (the server's)")
    parser.add_argument("--max_tokens", type=whole(1, 2**20), help="longest answer (the server's)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), help="makes answers reproducible")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="answer this and end; may be repeated")
    add_bool_flag(parser, "--stream", default=True, help="show an answer while it grows (%(default)s)")
    return parser.parse_args(argv)


@dataclass
class Dialogue:
    """What has been said, and how the server is asked."""

    client: object  # openai.OpenAI
    model: str
    system: str = ""
    settings: dict = field(default_factory=dict)
    turns: list[dict] = field(default_factory=list)

    def messages(self) -> list[dict]:
        """All messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, question: str, *, stream: bool) -> None:
        """Print the answer to a question, and keep both. Ctrl-C ends it early; an error leaves all as it was."""
        self.turns.append({"role": "user", "content": question})
        pieces: list[str] = []
        print("🤖️: ", end="", flush=True)
        try:
            self._answer(pieces, stream)
        except KeyboardInterrupt:
            print(" [已停止]", end="")
        except BaseException:
            self.turns.pop()
            raise
        print("\n", flush=True)
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _answer(self, pieces: list[str], stream: bool) -> None:
        """Print an answer, and collect its text; what the model only thinks is printed, but not kept."""
        settings = {name: value for name, value in self.settings.items() if value is not None}
        answer = self.client.chat.completions.create(
            model=self.model, messages=self.messages(), stream=stream, **settings
        )
        if not stream:
            pieces.append(answer.choices[0].message.content or "")
            print(pieces[-1], end="", flush=True)
            return
        with answer:  # left early, the connection is closed, and the server makes no more tokens
            is_thinking = False
            for chunk in answer:
                delta = chunk.choices[0].delta if chunk.choices else None
                thought, text = getattr(delta, "reasoning_content", None), getattr(delta, "content", None)
                if thought:
                    print(thought if is_thinking else f"<think>\n{thought}", end="", flush=True)
                    is_thinking = True
                if text:
                    pieces.append(text)  # first: Ctrl-C may come while it is printed
                    print(f"\n</think>\n{text}" if is_thinking else text, end="", flush=True)
                    is_thinking = False

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False to end. Raises ValueError and OSError for what cannot be done."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/reset":
            self.turns.clear()
            print("已清空历史对话")
        elif name == "/system":
            self.system = rest
            self.turns.clear()
            print(f"系统提示词：{self.system or '无'}")
        elif name == "/temp":
            self.settings["temperature"] = temperature(rest)
            print(f"温度：{rest}")
        elif name == "/save":
            save(Path(rest or "chat.jsonl"), self.messages())
        else:
            print(HELP if name == "/help" else f"没有命令 {name}\n{HELP}")
        return True


def temperature(text: str) -> float:
    """Raises ValueError for anything but a number from 0 to 2."""
    value = real(0, 2)(text)
    if isinstance(value, str):
        raise ValueError(f"/temp {value}")
    return value


def save(path: Path, messages: list[dict]) -> None:
    """Add a dialogue to a jsonl file, in the form that train_full_sft.py reads. Raises OSError."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"conversations": messages}, ensure_ascii=False) + "\n")
    print(f"已保存到 {path}")


def connect(args: argparse.Namespace) -> Dialogue:
    """A dialogue with the server. Raises ValueError if the package is missing, the server, or the model."""
    try:
        import openai
    except ImportError as error:
        raise ValueError('this needs OpenAI\'s Python package: pip install "openai>=1.66,<4"') from error
    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    try:
        names = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        raise ValueError(f"{args.base_url}: {error} (start one: python scripts/serve_openai_api.py)") from error
    if not names:
        raise ValueError(f"{args.base_url} has no models")
    return Dialogue(client, args.model or names[0], args.system, settings)


def talk(dialogue: Dialogue, lines: Iterable[str], stream: bool) -> int:
    """Answer questions and obey commands; returns how many failed."""
    import openai

    failures = 0
    for line in lines:
        try:
            if re.match(r"\s*/[a-z]+(\s|$)", line):  # /etc/hosts is no command
                if not dialogue.command(line):
                    break
            else:
                dialogue.ask(line, stream=stream)
        except (openai.OpenAIError, ValueError, OSError) as error:
            print(f"\nerror: {error}\n", file=sys.stderr)
            failures += 1
    return failures


def typed() -> Iterable[str]:
    """Lines as somebody types them, until an empty one, Ctrl-D or Ctrl-C."""
    reader = LineReader()
    while line := reader.ask("👶: "):
        yield line


def shown(prompts: list[str]) -> Iterable[str]:
    """Lines passed on, each printed as if it had been typed."""
    for prompt in prompts:
        print(f"👶: {prompt}")
        yield prompt


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 2 for what went wrong."""
    args = parse_args(argv)
    with plain_errors():
        dialogue = connect(args)
        failures = talk(dialogue, shown(args.prompt) if args.prompt else typed(), args.stream)
    return 2 if failures and args.prompt else 0


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a Windows pipe may know no emoji
    sys.exit(main())
