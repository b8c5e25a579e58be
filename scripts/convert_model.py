"""Convert a model: .pth <-> a folder of transformers; GGUF for llama.cpp and Ollama; ONNX; LoRA adapters and peft.

    python scripts/convert_model.py out/full_sft_512.pth MiniMind2-Small          # a folder, native Llama
    python scripts/convert_model.py MiniMind2-Small out/again_512.pth             # and back
    python scripts/convert_model.py out/full_sft_512.pth minimind-f16.gguf        # for llama.cpp, Ollama
    python scripts/convert_model.py out/full_sft_512.pth minimind.onnx            # for onnxruntime
    python scripts/convert_model.py out/full_sft_512.pth out/me_512.pth --lora out/lora/lora_identity_512.pth  # merged
    python scripts/convert_model.py out/lora/lora_identity_512.pth peft_identity  # an adapter, for peft
    python scripts/convert_model.py peft_identity out/lora/again_512.pth          # and back
    python scripts/convert_model.py out/full_sft_512.pth MiniMind2-Small --push me/MiniMind2-Small

reads   a .pth file of MiniMind of any age, a GGUF file, or a folder: MiniMind's own of any age, Llama, Qwen3,
        Qwen3Moe, Ernie4_5, Ernie4_5_Moe, GraniteMoeShared or Qwen2Moe, where it computes the same; or an adapter, a
        .pth file or a directory of peft
writes  a .pth file with its record, a folder that transformers, vLLM, SGLang, trl and peft load without our code, GGUF
        with Ollama's Modelfile, or ONNX with the tokenizer. Each is loaded again and compared; what differs is not
        kept, and nothing overwritten
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.flags import BriefParser, is_installed, non_empty, plain_errors  # noqa: E402
from model import adapter_conversion, conversion, hub  # noqa: E402
from model.architectures import LAYOUT_OF  # noqa: E402
from model.gguf_file import QUANTISATIONS  # noqa: E402
from model.LMConfig import LMConfig  # noqa: E402
from model.model_flags import TRAINING_FIELDS, add_model_flags, add_tokenizer_flag, given_fields  # noqa: E402
from model.opening import open_model  # noqa: E402

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt")  # of files, which no folder should be called by
PACKAGES = {"transformers": (), "pth": (), "gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; `to` and `dtype` are settled."""
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=settle)
    add = parser.add_argument
    add("source", type=non_empty, metavar="SRC", help="a .pth or .gguf file or a folder, of a model or a LoRA adapter")
    add("target", type=non_empty, metavar="DST", help="a new .pth, .gguf or .onnx file, or a new folder")
    add("--to", choices=PACKAGES, help="what to write; by default DST's ending says it, else a folder")
    add("--lora", type=non_empty, metavar="ADAPTER", help="add this adapter, a .pth file or one of peft, to SRC first")
    add(
        "--architecture", choices=sorted([*LAYOUT_OF, LMConfig.model_type]),
        help="of the folder; by default the one that computes the same. minimind: our own class with its code. With a "
        "directory of peft: the one that the adapter is on",
    )  # fmt: skip
    add(
        "--dtype", choices=QUANTISATIONS,
        help="how numbers are stored; f32 in a folder, f16 in a GGUF file by default, and always f32 in other files",
    )  # fmt: skip
    add("--base_model", type=non_empty, metavar="NAME", help="of an adapter for peft: noted there as its base model")
    add_tokenizer_flag(parser)
    hub.add_push_flags(parser)
    about = "what a .pth file without a record does not show, where the guess is wrong"
    add_model_flags(parser.add_argument_group("model", about), leave_out=TRAINING_FIELDS)
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> list[str]:
    """Work out what is to be written; returns every problem."""
    if args.to is None:
        ending = Path(args.target).suffix.lower().removeprefix(".")
        args.to = ending if ending in PACKAGES else "transformers"
    if args.dtype is None:
        args.dtype = "f16" if args.to == "gguf" else "f32"
    args.given, problems = given_fields(args)
    if args.to != "transformers" and not Path(args.target).name.endswith(f".{args.to}"):
        problems.append(f"{args.target}: the name must end in .{args.to}")
    if args.to == "transformers" and Path(args.target).suffix.lower() in WEIGHT_ENDINGS:
        problems.append(f"{args.target}: weights for transformers come in a folder: name one, {Path(args.target).stem}")
    missing = [package for package in PACKAGES[args.to] if not is_installed(package)]
    if missing:
        problems.append(f"a .{args.to} file: packages are missing; pip install {' '.join(missing)}")
    if args.to in ("pth", "onnx") and args.dtype != "f32":
        problems.append(f"--dtype {args.dtype}: a .{args.to} file holds float32")
    if args.to == "transformers" and args.dtype not in conversion.STORED_TYPES:
        problems.append(f"--dtype {args.dtype}: a folder holds one of {', '.join(conversion.STORED_TYPES)}")
    problems += hub.push_problems(args)
    return problems


def convert(args: argparse.Namespace) -> str:
    """Write DST; returns what was found when it was compared."""
    source, target = Path(args.source), Path(args.target)
    if adapter_conversion.is_adapter(source):
        return convert_adapter(args, source, target)
    if args.architecture and args.to != "transformers":
        raise ValueError("--architecture is of a folder of transformers: leave it out")
    read = open_model(source, args.given, args.tokenizer_path)
    if args.lora:
        read = adapter_conversion.merge_adapter(read, Path(args.lora))
    print(*read.remarks, sep="\n")
    if args.to == "pth":
        return conversion.convert_to_pth(read, target)
    if args.to == "gguf":
        return conversion.convert_to_gguf(read, target, args.dtype)
    if args.to == "onnx":
        return conversion.convert_to_onnx(read, target)
    return conversion.convert_to_folder(read, target, args.architecture, args.dtype, hub.address_of(args))


def convert_adapter(args: argparse.Namespace, source: Path, target: Path) -> str:
    """The same for an adapter by itself."""
    if args.license:
        raise ValueError("--license is for the model card, and an adapter has none: leave it out")
    if args.to in ("gguf", "onnx") or args.lora:
        raise ValueError(f"{source} is a LoRA adapter: name the weights it was trained on as SRC, and it with --lora")
    read = adapter_conversion.read_adapter(source, args.given, args.architecture)
    print(*read.remarks, sep="\n", end="\n" * bool(read.remarks))
    if args.to == "pth":
        return adapter_conversion.convert_adapter_to_pth(read, target)
    return adapter_conversion.convert_adapter_to_peft(read, target, args.architecture, args.base_model)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    target = Path(args.target)
    files = [] if args.to == "transformers" else conversion.files_of(target)
    with plain_errors():
        if args.push:
            names = [file.name for file in files] if files else None
            hub.check_upload(args.hub, args.push, names, args.private, args.replace)
        try:
            verified = convert(args)
        except FileExistsError as error:
            if not args.push:
                raise
            later = hub.upload_command(args.hub, args.push, files or [target], args.private)
            raise FileExistsError(f"{error}; or, to upload what is there as it is, run `{later}`") from error
        print(f"{target}: {verified}", flush=True)
        if args.push:
            print(hub.upload(args.hub, args.push, target, files[1:], private=args.private, replace=args.replace))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # everything is written under another name first
        sys.exit(130)
