"""Merge a LoRA adapter into full weights, or write it in the format of Hugging Face's peft.

    python scripts/convert_lora.py --lora_name lora_medical --merge_to medical       # eval_model.py --weight medical
    python scripts/convert_lora.py --lora_name lora_medical --peft_dir out/peft_medical

reads   out/lora/{lora_name}_{dim}[_moe].pth, a .pth file of any MiniMind version, or a directory of peft
        out/{from_weight}_{dim}[_moe].pth      when merging
writes  out/{merge_to}_{dim}[_moe].pth, or the directory
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.flags import BriefParser, file_name, non_empty, plain_errors  # noqa: E402
from model.adapters import lora_path, read_lora, write_peft  # noqa: E402
from model.loading import save_weights, weights_path  # noqa: E402
from model.model_flags import TRAINING_FIELDS, add_model_flags, add_tokenizer_flag, settle_model  # noqa: E402
from model.model_lora import load_lora, merge_lora  # noqa: E402
from model.opening import load_model  # noqa: E402
from model.record import describe_file, describe_program, write_record  # noqa: E402
from model.vocabulary import keep_tokenizer, tokenizer_of  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=find_problems)
    add_model_flags(parser, leave_out=TRAINING_FIELDS)
    add_tokenizer_flag(parser)
    parser.add_argument(
        "--out_dir", type=non_empty, default="out", help="where weights are read and written (%(default)s)"
    )
    parser.add_argument(
        "--lora_name", type=non_empty, required=True, help="the adapter: a name, a .pth file, or a directory of peft"
    )
    parser.add_argument(
        "--from_weight", type=non_empty, default="full_sft", help="weights that it was trained on (%(default)s)"
    )
    parser.add_argument("--merge_to", type=file_name, metavar="NAME", help="write full weights under this new name")
    parser.add_argument("--peft_dir", type=non_empty, metavar="DIR", help="write the adapter for peft")
    parser.add_argument(
        "--base_model", type=non_empty, help="noted in the peft directory: the base model's name or directory"
    )
    return parser.parse_args(argv)


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong between the flags."""
    settled = settle_model(args, args.from_weight)
    args.config, args.base, args.remarks = settled.config, settled.weights, settled.remarks
    problems = settled.problems
    if args.merge_to and args.base is None:
        problems.append("--from_weight none: the adapter is merged into the weights that it was trained on")
    if not args.merge_to and not args.peft_dir:
        problems.append("nothing to do: pass --merge_to NAME, --peft_dir DIR, or both")
    return problems


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with plain_errors():
        config = args.config
        for remark in args.remarks:
            print(remark, file=sys.stderr)
        merged_path = weights_path(args.out_dir, args.merge_to, config) if args.merge_to else None
        if merged_path and merged_path.exists():  # the base weights, perhaps: nothing could bring them back
            raise FileExistsError(f"{merged_path} exists: choose another name for --merge_to, or remove the file")
        adapter_path = lora_path(args.out_dir, args.lora_name, config)
        adapter = read_lora(adapter_path, config)
        if args.peft_dir:
            write_peft(adapter, args.peft_dir, args.base_model)
            print(args.peft_dir)
        if merged_path:
            model = load_model(config, args.base)
            tokenizer = tokenizer_of(args.base, config.vocab_size, args.tokenizer_path)
            load_lora(model, adapter)
            merge_lora(model)
            save_weights(model.state_dict(), merged_path)
            facts = {"started_from": describe_file(args.base), "adapter": describe_file(adapter_path)}
            facts["tokenizer"] = keep_tokenizer(tokenizer, merged_path.parent)
            write_record(merged_path, config, stage="convert_lora", **facts, **describe_program())
            print(merged_path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # files are written all or nothing
        sys.exit(130)
