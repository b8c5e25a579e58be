"""Convert a model: .pth <-> a folder of transformers, or a GGUF file for llama.cpp and Ollama.

    python scripts/convert_model.py out/full_sft_512.pth MiniMind2-Small          # a folder, native Llama
    python scripts/convert_model.py MiniMind2-Small out/full_sft_512.pth          # and back
    python scripts/convert_model.py out/full_sft_512.pth minimind-f16.gguf        # for llama.cpp, Ollama
    python scripts/convert_model.py MiniMind2-Small minimind-q8_0.gguf --dtype q8_0

reads   a .pth file of MiniMind of any age, a GGUF file, or a folder: MiniMind's own of any age, Llama, Qwen3,
        Qwen3Moe, Ernie4_5, Ernie4_5_Moe, GraniteMoeShared or Qwen2Moe, where it computes what MiniMind computes
writes  a .pth file with its record, a folder that transformers, vLLM, SGLang, trl and peft load without our code, or a
        GGUF file. Each is loaded again and compared with the source; what differs is not kept, and nothing overwritten
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.flags import BriefParser, is_installed, non_empty, plain_errors  # noqa: E402
from model.architectures import LAYOUT_OF  # noqa: E402
from model.conversion import STORED_TYPES, convert_to_folder, convert_to_gguf, convert_to_pth  # noqa: E402
from model.gguf_file import QUANTISATIONS  # noqa: E402
from model.model_flags import TRAINING_FIELDS, add_model_flags, add_tokenizer_flag, given_fields  # noqa: E402
from model.opening import open_model  # noqa: E402

TARGETS = ("transformers", "pth", "gguf")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; `to` and `dtype` are settled."""
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=settle)
    parser.add_argument("source", type=non_empty, metavar="SRC", help="a .pth file, a folder or a .gguf file")
    parser.add_argument("target", type=non_empty, metavar="DST", help="a new .pth file, folder or .gguf file")
    parser.add_argument("--to", choices=TARGETS, help="what to write; by default DST's ending says it, else a folder")
    parser.add_argument(
        "--architecture", choices=sorted(LAYOUT_OF), help="of the folder; by default the one that computes the same"
    )
    parser.add_argument(
        "--dtype", choices=QUANTISATIONS,
        help="how numbers are stored; f32 in a folder, f16 in a GGUF file by default, and always f32 in a .pth file",
    )  # fmt: skip
    add_tokenizer_flag(parser)
    add_model_flags(
        parser.add_argument_group("model", "what a .pth file without a record does not show, where the guess is wrong"),
        leave_out=TRAINING_FIELDS,
    )
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> list[str]:
    """Work out what is to be written; returns every problem."""
    if args.to is None:
        args.to = {".pth": "pth", ".gguf": "gguf"}.get(Path(args.target).suffix.lower(), "transformers")
    if args.dtype is None:
        args.dtype = "f16" if args.to == "gguf" else "f32"
    args.given, problems = given_fields(args)
    if args.to != "transformers" and not Path(args.target).name.endswith(f".{args.to}"):
        problems.append(f"{args.target}: the name must end in .{args.to}")
    if args.to == "gguf" and not is_installed("gguf"):
        problems.append("a .gguf file: the package is missing; pip install gguf")
    if args.to == "pth" and args.dtype != "f32":
        problems.append(f"--dtype {args.dtype}: a .pth file holds float32")
    if args.to == "transformers" and args.dtype not in STORED_TYPES:
        problems.append(f"--dtype {args.dtype}: a folder holds one of {', '.join(STORED_TYPES)}")
    if args.architecture and args.to != "transformers":
        problems.append("--architecture is of a folder of transformers: leave it out")
    return problems


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with plain_errors():
        source, target = open_model(args.source, args.given, args.tokenizer_path), Path(args.target)
        for remark in source.remarks:
            print(remark)
        if args.to == "pth":
            verified = convert_to_pth(source, target)
        elif args.to == "gguf":
            verified = convert_to_gguf(source, target, args.dtype)
        else:
            verified = convert_to_folder(source, target, args.architecture, args.dtype)
    print(f"{target}: {verified}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # everything is written under another name first
        sys.exit(130)
