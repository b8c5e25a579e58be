"""The flags of programs that talk to a model: which model it is, and how its answers are sampled."""

import argparse
from pathlib import Path

from common.device import DTYPES
from common.flags import add_bool_flag, non_empty, real, whole
from inference.models import Choice, continues_text
from inference.sampling import PENALTIES, TEMPERATURES, SamplingParams
from model.loading import MODEL_MODES
from model.model_flags import (
    TRAINING_FIELDS,
    add_model_flags,
    add_tokenizer_flag,
    given_fields,
    parse_rope_scaling,
    settle_model,
)
from model.opening import is_foreign, is_path


def add_choice_flags(parser) -> None:
    """Which model, on which device; `settle_choice` reads them."""
    add_model_flags(parser, leave_out=TRAINING_FIELDS)
    parser.add_argument(
        "--out_dir", "--save_dir", type=non_empty, default="out", help="directory of the .pth files (%(default)s)"
    )
    parser.add_argument(
        "--model_mode", type=int, default=1, choices=MODEL_MODES,
        help="0 pretrain (continues raw text), 1 full_sft, 2 rlhf, 3 reason (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--weight", type=non_empty, metavar="NAME",
        help="talk to {out_dir}/NAME_{dim}[_moe].pth instead, e.g. full_dist; or to a .pth file, folder or .gguf file",
    )  # fmt: skip
    parser.add_argument(
        "--load", nargs="+", type=non_empty, default=["0"], metavar=("{0,1}", "PATH"),
        help="0: a stage's weights; 1 [PATH]: a transformers directory (./MiniMind2), a .pth or a .gguf file",
    )  # fmt: skip
    add_tokenizer_flag(parser)
    parser.add_argument(
        "--lora_name", "--lora_weight", nargs="+", type=non_empty, default=[], metavar="NAME",
        help="adapters in {out_dir}/lora, .pth files, or directories of peft; the first is used",
    )  # fmt: skip
    parser.add_argument(
        "--load_from", type=non_empty, metavar="PATH", help="'model': same as --load 0; PATH: same as --load 1 PATH"
    )
    parser.add_argument(
        "--max_seq_len", dest="max_position_embeddings", type=whole(16, 2**20), default=argparse.SUPPRESS,
        help="context: prompt and answer, in tokens (the model's own)",
    )  # fmt: skip
    add_bool_flag(
        parser, "--inference_rope_scaling", default=False,
        help="same as --rope_scaling yarn:16:2048; upstream's is yarn:16:2048:1",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=non_empty, default="auto", help="cpu, cuda, cuda:1, mps; auto takes the fastest (%(default)s)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="of weights and arithmetic; auto: bfloat16 or float16 on CUDA, else float32 (%(default)s)",
    )  # fmt: skip


def settle_choice(args: argparse.Namespace) -> list[str]:
    """Add `args.choice`, the model that the flags of `add_choice_flags` name; returns what is wrong with them."""
    args.lora_name = [name for name in args.lora_name if name != "None"]  # upstream's default is the text 'None'
    if args.inference_rope_scaling and args.rope_scaling is None:
        args.rope_scaling = parse_rope_scaling("yarn:16:2048")
    kind, *path = args.load
    problems = []
    if kind not in ("0", "1") or len(path) > 1 or (kind == "0" and path):
        problems.append(f"--load {' '.join(args.load)}: use --load 0, --load 1, or --load 1 PATH")
    folder = None
    if args.load_from not in (None, "model"):
        folder = args.load_from
    elif kind == "1" and not problems:
        folder = path[0] if path else "MiniMind2"
    if folder is not None and args.weight is not None:
        which = "--load" if args.load_from in (None, "model") else "--load_from"
        problems.append(f"--weight {args.weight}: {which} says to take {folder} instead; pass only one of the two")
    weight = Path(folder) if folder is not None else args.weight or MODEL_MODES[args.model_mode]
    if is_path(str(weight)) and is_foreign(weight):
        args.choice = Choice(Path(weight), None, args.model_mode == 0, args.out_dir)
        given, _ = given_fields(args)
        problems += [f"{field.text}: {weight} is no MiniMind, its config.json says it" for field in given.values()]
        return problems
    settled = settle_model(args, weight)
    # settled.weights is None where several fit, which is a problem.
    is_said = folder is not None and args.model_mode == 0
    is_text = settled.weights is not None and (is_said or continues_text(settled.weights))
    args.choice = Choice(
        settled.weights, settled.config, is_text, args.out_dir, tuple(settled.remarks), args.tokenizer_path
    )
    return problems + settled.problems


def add_sampling_flags(parser) -> None:
    """How answers are sampled; `sampling_params` reads them."""
    parser.add_argument(
        "--temperature", type=real(*TEMPERATURES, or_zero=True), help="0 is greedy (0.85; 0 with --score)"
    )
    parser.add_argument("--top_p", type=real(1e-6, 1), default=0.85, help="nucleus mass, 1 is off (%(default)s)")
    parser.add_argument("--top_k", type=whole(0, 2**16), default=0, help="candidates kept, 0 is off (%(default)s)")
    parser.add_argument(
        "--repetition_penalty", "--rp", type=real(*PENALTIES), default=1.0, help="1 is off (%(default)s)"
    )
    parser.add_argument(
        "--max_new_tokens", type=whole(1, 2**20), help="longest answer, without the prompt (1024; 128 with --score)"
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), help="makes every answer reproducible; without it they vary"
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the flags of `add_sampling_flags` say. Raises ValueError for values that do not go together."""
    return SamplingParams(
        args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed
    )
