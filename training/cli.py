"""The flags of every training stage, declared once.

Flag names are upstream MiniMind's (2025-02); the names its later versions use are accepted as aliases. A stage
overrides defaults by keyword: ``stage_parser(__doc__, epochs=2, learning_rate=5e-5)``; a misspelt name fails at once.
"""

import argparse
import os

from common.device import DTYPES
from common.flags import (
    INTERVAL,
    BriefParser,
    add_bool_flag,
    file_name,
    is_installed,
    non_empty,
    parse_resume,
    real,
    whole,
)
from model.LMConfig import LMConfig, config_fields
from model.model_flags import add_model_flags, add_tokenizer_flag, settle_model

LR_SCHEDULES = ("cosine", "upstream", "constant")
TRACKERS = ("none", "wandb", "swanlab", "tensorboard")


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong between the shared flags, or around them; an empty list when all is well.

    Adds to the flags what follows from them: `config` (LMConfig), `start_weights` (Path or None) and `remarks` on both.
    """
    if args.use_wandb and args.tracker == "none":
        args.tracker = "wandb"
    problems = []
    if args.tracker != "none" and not is_installed(args.tracker):
        problems.append(f"--tracker {args.tracker}: the package is missing; pip install {args.tracker}")
    if args.deepspeed and not is_installed("deepspeed"):
        problems.append("--deepspeed: the package is missing; pip install deepspeed ninja")
    if args.deepspeed and not os.path.isfile(args.deepspeed):
        problems.append(f"--deepspeed {args.deepspeed}: no such file; configs/zero1.json, zero2, zero3 are shipped")
    if args.deepspeed and args.dtype == "float16":
        problems.append("--deepspeed with --dtype float16: only bfloat16 and float32 are supported")
    settled = settle_model(args, args.from_weight)
    args.config, args.start_weights, args.remarks = settled.config, settled.weights, settled.remarks
    return problems + settled.problems


def stage_parser(description: str, **stage_defaults) -> BriefParser:
    """The parser of one stage: all shared flags, with the stage's own defaults.

    Args:
        description: the stage's module docstring, shown by ``--help``.
        stage_defaults: flag name -> default; ``data_path`` is required, and ``save_weight`` where the stage has such a
            flag (LoRA names its file otherwise).
    Raises: KeyError for a default that belongs to no flag.
    """
    parser = BriefParser(description=description, formatter_class=_HelpFormatter, check=find_problems)

    group = parser.add_argument_group("model", "read from the weights that --from_weight names, so seldom needed")
    add_model_flags(group)
    group.add_argument(
        "--from_weight",
        type=non_empty,
        default="none",
        help="weights to start from: a stage name (read from --out_dir), a .pth file, a folder of transformers, "
        "a .gguf file, or 'none' for random weights",
    )
    add_tokenizer_flag(group)

    group = parser.add_argument_group("data")
    group.add_argument("--data_path", type=non_empty, default=None, help="the jsonl file to train on")
    group.add_argument(
        "--max_seq_len", type=whole(8, 2**20), default=512, help="longest sequence in tokens (not characters)"
    )
    group.add_argument(
        "--on_bad_line",
        choices=("stop", "skip"),
        default="stop",
        help="a line that cannot be used: stop, or skip and count",
    )
    group.add_argument(
        "--heldout_share",
        type=real(0, 0.5, below=True),
        default=0.005,
        help="share of the data never trained on, for the held-out loss",
    )
    group.add_argument(
        "--num_workers", type=whole(0, 256), default=1, help="batches prepared ahead, by a background thread; 0: none"
    )
    group.add_argument(
        "--cache_dir", type=non_empty, default="out/cache", help="where the tokenised data is kept between runs"
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=whole(1, 10**6), default=1, help="passes over the data")
    group.add_argument(
        "--batch_size", type=whole(1, 2**20), default=32,
        help="sequences per micro-batch on average: every micro-batch holds batch_size x (mean length) tokens",
    )  # fmt: skip
    group.add_argument(
        "--accumulation_steps", type=whole(1, 2**20), default=1, help="micro-batches per optimizer step and process"
    )
    group.add_argument("--learning_rate", type=real(1e-12, 1), default=5e-4, help="peak learning rate")
    group.add_argument(
        "--lr_schedule", choices=LR_SCHEDULES, default="cosine",
        help="after warm-up: cosine to 10 %%; 'upstream' is lr/10 + 0.5 lr (1 + cos), which starts at 1.1x the peak",
    )  # fmt: skip
    group.add_argument("--warmup_iters", type=whole(0, INTERVAL), default=0, help="steps of linear warm-up")
    group.add_argument(
        "--weight_decay", type=real(0, 10), default=0.1, help="AdamW decay of matrices (never norms, embedding)"
    )
    group.add_argument(
        "--grad_clip", type=real(1e-3, 1e6, or_zero=True), default=1.0, help="largest gradient norm; 0: no clipping"
    )
    group.add_argument(
        "--max_steps", type=whole(0, INTERVAL), default=0, help="stop after this many optimizer steps; 0: all epochs"
    )
    group.add_argument("--seed", type=whole(0, 2**31 - 1), default=1337, help="seeds weights, data order and dropout")

    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", type=non_empty, default="auto", help="auto, cpu, cuda, cuda:0, mps")
    group.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16",
        help="dtype of the matrix products; weights stay float32. float32 where the device has no fast bfloat16",
    )  # fmt: skip
    add_bool_flag(
        group, "--use_compile", default=None, help="torch.compile the model; default: on for CUDA, off elsewhere"
    )
    group.add_argument(
        "--threads", type=whole(0, os.cpu_count() or 1), default=0, help="CPU threads; 0: PyTorch's choice"
    )
    group.add_argument(
        "--deepspeed", type=non_empty, default=None, metavar="JSON",
        help="shard optimizer and weights with DeepSpeed ZeRO, e.g. configs/zero2.json; for models of 500M and more",
    )  # fmt: skip

    group = parser.add_argument_group("logging and saving (intervals count optimizer steps)")
    group.add_argument(
        "--out_dir",
        "--save_dir",
        dest="out_dir",
        type=non_empty,
        default="out",
        help="where weights are read and written",
    )
    if "save_weight" in stage_defaults:
        group.add_argument(
            "--save_weight", type=file_name, help="name of the weights file: {out_dir}/{name}_{dim}[_moe].pth"
        )
    group.add_argument("--log_interval", type=whole(1, INTERVAL), default=100, help="steps between log lines")
    group.add_argument(
        "--save_interval", type=whole(0, INTERVAL), default=100, help="steps between saves; 0: only at the end"
    )
    group.add_argument(
        "--save_minutes", type=real(0, 1e6), default=10, help="save at least this often; 0: by steps only"
    )
    group.add_argument(
        "--eval_interval",
        type=whole(0, INTERVAL),
        default=500,
        help="steps between held-out evaluations and samples; 0: only at the end",
    )
    group.add_argument(
        "--resume", "--from_resume", type=parse_resume, nargs="?", const=True, default=False, metavar="BOOL|auto",
        help="continue from the newest state in {out_dir}/checkpoints; auto: start anew if there is none",
    )  # fmt: skip
    group.add_argument(
        "--tracker", choices=TRACKERS, default="none",
        help="also log there; wandb and swanlab work offline (WANDB_MODE=offline, SWANLAB_MODE=offline)",
    )  # fmt: skip
    add_bool_flag(group, "--use_wandb", default=False, help="the same as --tracker wandb")
    group.add_argument("--wandb_project", type=non_empty, default="MiniMind", help="project, for every tracker")
    group.add_argument(
        "--wandb_run_name", type=non_empty, default=None, help="run name, for every tracker; default: the log's name"
    )

    # Launchers append these; rank and world size really come from the environment (torchrun, deepspeed).
    parser.add_argument("--local_rank", "--local-rank", type=whole(-1, 2**20), default=-1, help=argparse.SUPPRESS)
    add_bool_flag(parser, "--ddp", default=False, help=argparse.SUPPRESS)

    known = {action.dest for action in parser._actions}
    if unknown := set(stage_defaults) - known:
        raise KeyError(f"stage_parser: no flag is named {sorted(unknown)}")
    parser.set_defaults(stage=stage_defaults.get("save_weight", "lora"), **stage_defaults)
    return parser


def config_from(args: argparse.Namespace, **changes) -> LMConfig:
    """The configuration of the model to train, with some fields changed. Raises ValueError if that is impossible."""
    return LMConfig(**{**config_fields(args.config), **changes})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's line breaks and shows every default that there is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)
