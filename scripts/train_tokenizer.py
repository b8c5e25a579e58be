"""Train a byte-level BPE tokenizer for Chinese and English on your own data.

    python scripts/train_tokenizer.py --data_path dataset/pretrain_hq.jsonl dataset/sft_mini_512.jsonl --weights 2 1

Reads   jsonl files of any stage: {"text"}, {"conversations"} or {"chosen", "rejected"}
Writes  a directory that `AutoTokenizer.from_pretrained` loads (default out/tokenizer)

Byte-pair encoding starts from the 256 bytes and, again and again, makes one token of the most frequent pair of
neighbours (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: Radford et al. 2019). With bytes no text
is ever unknown. In a small model the embedding is a large share of all weights, hence only 6,400 entries.
One text in fifty is held out (by its hash, so it is never trained on) and shows how well the result compresses, next to
the tokenizer of --compare on the same text. 6,400 entries are few, so what helps one kind of text hurts another: give
each kind a file and its part of the sample with --weights, and look at all of them.
"""

import argparse
import hashlib
import heapq
import json
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.flags import BriefParser, non_empty, plain_errors, real, whole  # noqa: E402
from common.jsonl import Malformed, parse_object, strip_line  # noqa: E402
from model.chat_format import CONTROL_TOKENS, RESERVED_TOKENS, SPECIAL_TOKENS, ChatFormat, check_messages  # noqa: E402
from model.loading import TOKENIZER_DIR  # noqa: E402

HELDOUT_ONE_IN = 50
HELDOUT_BYTES = 2_000_000  # of each file, language and kind: enough for three digits
LANGUAGES = ("zh", "en")
KINDS = {None: "texts", "user": "questions", "assistant": "answers"}  # what is measured, by role


def read_texts(path: Path) -> Iterator[tuple[str | None, str]]:
    """(role, text) of each message of a jsonl file, (None, text) of plain texts. Raises ValueError for a bad line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = strip_line(line)
            if not line:
                continue
            try:
                found = texts_of(parse_object(line))
            except Malformed as error:
                raise ValueError(
                    f"{path}, line {number}: {error}. Each line must be an object with text, with conversations, or "
                    "with chosen and rejected; correct or remove this line"
                ) from error
            yield from found


def texts_of(row: dict) -> list[tuple[str | None, str]]:
    """(role, text) of each message of a row, of whatever kind it is; (None, text) of a plain text. Raises Malformed."""
    if isinstance(row.get("text"), str):
        return [(None, row["text"])]
    found = []
    for key in ("conversations",) if "conversations" in row else ("chosen", "rejected"):
        if not isinstance(row.get(key), list):
            raise Malformed("wrong type", f'neither "text" is a string nor "{key}" an array')
        check_messages(row[key], f'"{key}"')
        found += [(message["role"], message.get("content") or "") for message in row[key]]
    return found


def is_heldout(text: str) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % HELDOUT_ONE_IN == 0


def language(text: str) -> str:
    """'zh' or 'en', by the bytes per character: three for a Chinese one, one for an English one."""
    return "zh" if len(text.encode()) > 1.4 * len(text) else "en"


class ByteSample:
    """A uniform random sample of a stream of texts, as many as fit in `max_bytes` (the ones with the least keys)."""

    def __init__(self, max_bytes: float, rng: random.Random):
        self.max_bytes, self.rng = max_bytes, rng
        self.n_bytes, self.heap = 0, []

    def add(self, text: str) -> None:
        heapq.heappush(self.heap, (-self.rng.random(), text))
        self.n_bytes += len(text.encode())
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= len(heapq.heappop(self.heap)[1].encode())

    def texts(self) -> list[str]:
        return [text for _, text in self.heap]


def sample_texts(
    paths: list[Path], max_mb: float, weights: list[float] | None = None, seed: int = 42
) -> tuple[list[str], dict[str, list[str]]]:
    """(training texts, held-out texts by group), in one pass that holds no more than the sample in memory.

    The files' parts of the sample stand in the ratio of `weights` (equal by default), whatever their sizes, as far as a
    file has so much. Messages are trained on as the model sees them, behind their role. Held-out questions and answers
    are measured apart: users write unlike assistants.
    """
    rng = random.Random(seed)
    weights = weights or [1.0] * len(paths)
    train, heldout = [], {}
    for path, weight in zip(paths, weights, strict=True):
        kept = ByteSample(weight / sum(weights) * max_mb * 1e6, rng)
        unseen = {
            f"{path.name} {x} {kind}": ByteSample(HELDOUT_BYTES, rng) for kind in KINDS.values() for x in LANGUAGES
        }
        for role, text in read_texts(path):
            if not is_heldout(text):
                kept.add(f"{role}\n{text}" if role else text)
            elif role in KINDS:
                unseen[f"{path.name} {language(text)} {KINDS[role]}"].add(text)
        train += kept.texts()
        heldout |= {group: sample.texts() for group, sample in unseen.items()}
        print(f"{path.name}: {kept.n_bytes / 1e6:.1f} MB to train on", flush=True)
    return train, heldout


def sample_code(max_bytes: float) -> tuple[list[str], list[str]]:
    """(training, held-out) Python source, from the standard library that every machine has: short modules first.

    Chat data has hardly any indented code, and without some the tokenizer would spend a token on every blank.
    """
    train, heldout, n_bytes = [], [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.stat().st_size):
        text = path.read_text(encoding="utf-8")
        if is_heldout(path.name) or path.name == "argparse.py":
            heldout.append(text)
        elif n_bytes < max_bytes:
            train.append(text)
            n_bytes += len(text.encode())
    return train, heldout


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400, max_token_bytes: int = 16) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` entries, special tokens first. Raises ValueError if the texts are too few.

    Digits stay single, so that a number looks the same wherever it stands. No token is longer than `max_token_bytes`
    (five Chinese characters): longer ones are stock phrases of one source, which waste entries elsewhere.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if not smallest < vocab_size <= 65536:
        raise ValueError(
            f"vocab_size is {vocab_size}: it must be above {smallest} (special tokens and bytes) and at most 65536 "
            "(the token cache stores 16 bits)"
        )
    tokenizer = Tokenizer(models.BPE())
    # Digits, then GPT-2's regex: llama.cpp knows this pair by the name "smollm".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=max_token_bytes,
    )
    # If a special token's text were in the corpus, merges could lead to it and plain text could forge it.
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer.train_from_iterator((piece for text in texts for piece in special.split(text)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give only {tokenizer.get_vocab_size()} of {vocab_size} entries: use more text (--data_path, "
            "--max_mb) or a smaller --vocab_size"
        )
    # The trainer marks all of them special, but tags belong to what the model says: decoding must show them.
    tokenizer = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))
    hidden = CONTROL_TOKENS + RESERVED_TOKENS
    tokenizer.add_tokens([AddedToken(token, special=token in hidden, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Writes the files that transformers (4.57 and 5) and the tools around it read."""
    template = (TOKENIZER_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    return sum(
        len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    )


def report(
    tokenizer: PreTrainedTokenizerFast,
    heldout: dict[str, list[str]],
    other: PreTrainedTokenizerFast | None = None,
) -> list[str]:
    """Lines about the vocabulary, and about each group of texts: compression, byte pieces, round trip.

    With `other`, its bytes per token on the same text and by how much this tokenizer's are more.
    """
    chat_format = ChatFormat(tokenizer)
    shown = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    pieces = {i for i, text in enumerate(shown) if "\ufffd" in text}  # tokens that are no whole characters
    han = [text for text in shown if re.search("[\u3400-\u9fff]", text)]
    compared = f"{'other':>8}{'more':>8}" if other else ""
    lines = [
        f"{len(tokenizer)} entries: {len(han)} with Han characters ({sum(len(text) == 1 for text in han)} of them "
        f"one character), {len(pieces)} with parts of characters",
        f"longest tokens: {' '.join(map(repr, sorted(shown[len(SPECIAL_TOKENS) :], key=len)[-10:]))}",
        f"longest with Han characters: {' '.join(sorted(han, key=len)[-10:])}",
        f"{'held-out text':36}{'MB':>8}{'bytes/token':>13}{compared}"
        f"{'chars/token':>13}{'byte pieces':>13}{'round trip':>12}",
    ]
    for group, texts in heldout.items():
        encoded = [ids[1:-1] for ids in chat_format.encode_texts(texts)]
        n_tokens = sum(map(len, encoded))
        if not n_tokens:
            continue
        n_bytes, n_chars = sum(len(text.encode()) for text in texts), sum(map(len, texts))
        n_pieces = sum(i in pieces for ids in encoded for i in ids)
        exact = sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))
        if other:
            n_other = count_tokens(other, texts)
            compared = f"{n_bytes / n_other:8.3f}{n_other / n_tokens - 1:+8.1%}"
        lines.append(
            f"{group:36}{n_bytes / 1e6:8.2f}{n_bytes / n_tokens:13.3f}{compared}{n_chars / n_tokens:13.3f}"
            f"{n_pieces / n_tokens:13.2%}{'all' if exact == len(texts) else f'{exact}/{len(texts)}':>12}"
        )
    return lines


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=find_problems)
    add = parser.add_argument
    add(
        "--data_path", nargs="+", type=non_empty, metavar="FILE", default=["./dataset/pretrain_hq.jsonl"],
        help="jsonl files (default: %(default)s)",
    )  # fmt: skip
    add(
        "--weights", nargs="+", type=real(1e-6, 1e6),
        help="parts of the sample the files give, e.g. 7 1 (default: equal ones)",
    )  # fmt: skip
    add("--compare", type=non_empty, metavar="DIR", help="measure this tokenizer on the same held-out text too")
    add("--out_dir", type=non_empty, default="out/tokenizer", help="directory to write (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the tokenizer that is in --out_dir")
    least = len(SPECIAL_TOKENS) + 257
    vocab_help = "entries, 16 special tokens and 256 bytes included (%(default)s)"
    add("--vocab_size", type=whole(least, 2**16), default=6400, help=vocab_help)
    add("--max_mb", type=real(0.001, 1e5), default=50, help="size of the sample; %(default)s takes some minutes")
    code_help = "Python source on top, relative to the sample (%(default)s)"
    add("--code_share", type=real(0, 1), default=0.004, help=code_help)
    bytes_help = "longest token; a Chinese character is 3 bytes (%(default)s)"
    add("--max_token_bytes", type=whole(1, 1000), default=16, help=bytes_help)
    add("--seed", type=whole(0, 2**63 - 1), default=42, help="decides which texts are sampled (%(default)s)")
    return parser.parse_args(argv)


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong between the flags, or with the files that they name; turns the paths into Path."""
    args.data_path, args.out_dir = [Path(path) for path in args.data_path], Path(args.out_dir)
    problems = [
        f"--data_path {path}: no such file: download it as README.md says, or try dataset/sample/pretrain.jsonl"
        for path in args.data_path
        if not os.path.isfile(path)  # Path.is_file raises for some names
    ]
    if args.weights and len(args.weights) != len(args.data_path):
        problems.append(f"--weights {args.weights}: give one number for each of the {len(args.data_path)} files")
    if args.compare and not os.path.isfile(os.path.join(args.compare, "tokenizer.json")):
        problems.append(f"--compare {args.compare}: has no tokenizer.json: give the directory of a tokenizer")
    if os.path.exists(args.out_dir / "tokenizer.json") and not args.overwrite:
        problems.append(
            f"--out_dir {args.out_dir}: already holds a tokenizer, and models trained with it need it: choose another "
            "directory, or add --overwrite"
        )
    return problems


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with plain_errors():
        train, heldout = sample_texts(args.data_path, args.max_mb, args.weights, args.seed)
        n_bytes = sum(len(text.encode()) for text in train)
        code, heldout["Python code"] = sample_code(args.code_share * n_bytes)
        tokenizer = train_tokenizer(train + code, args.vocab_size, args.max_token_bytes)
        save_tokenizer(tokenizer, args.out_dir)
    other = AutoTokenizer.from_pretrained(args.compare) if args.compare else None
    print("\n".join(report(AutoTokenizer.from_pretrained(args.out_dir), heldout, other)))
    print(f"written: {args.out_dir}")


if __name__ == "__main__":
    main()
