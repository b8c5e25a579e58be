"""The flags that choose a model, one for each field of LMConfig, and what they mean together with a weights file."""

import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from common.flags import Problem, add_bool_flag, non_empty, parse_bool, problem, real, whole

from .LMConfig import PUBLISHED, ROPE_SCALING_TYPES, LMConfig, config_fields
from .loading import weights_name
from .opening import describe, is_path
from .sizes import Given, contradictions

TRAINING_FIELDS = ("dropout", "aux_loss_alpha", "seq_aux")  # without effect on what a trained model says


class ModelFlag(NamedTuple):
    """A flag `--{name}` for the field of LMConfig, with the type that parses it and the names other programs use."""

    field: str
    type: Callable
    help: str
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The field's own, but for the context: in training, --max_seq_len says where the data is cut."""
        return "max_position_embeddings" if self.field == "max_seq_len" else self.field


def parse_rope_scaling(text: str) -> dict[str, str | float] | Problem:
    """`TYPE:FACTOR` or `yarn:FACTOR:TRAINED[:ATTENTION]` as LMConfig's `rope_scaling`; LMConfig checks the values."""
    kind, *numbers = text.split(":")
    names = ["factor"] + ["original_max_position_embeddings", "attention_factor"] * (kind == "yarn")
    names = names[: len(numbers)]  # those that are given
    try:
        scaling = dict(zip(names, map(float, numbers), strict=True))
    except ValueError:  # no number, or one too many
        scaling = {}
    if not scaling:
        return problem(text, "must be TYPE:FACTOR or yarn:FACTOR:TRAINED[:ATTENTION], e.g. linear:2 or yarn:4:512")
    if kind == "yarn" and len(numbers) < 2:
        return problem(text, "must say the length trained on, e.g. yarn:4:512")
    return {"rope_type": kind, **scaling}


# Every field but these: vocab_size and the special tokens' ids are the tokenizer's, scoring_func and
# tie_word_embeddings can have one value only, use_cache is for programs that call the model.
MODEL_FLAGS = (
    ModelFlag("dim", whole(1, 2**16), "width of the model", ("--hidden_size",)),
    ModelFlag("n_layers", whole(1, 1000), "number of blocks", ("--num_hidden_layers",)),
    ModelFlag("n_heads", whole(1, 2**12), "query heads; each has dim / n_heads channels", ("--num_attention_heads",)),
    ModelFlag(
        "n_kv_heads", whole(1, 2**12), "key/value heads, each for n_heads / n_kv_heads query heads",
        ("--num_key_value_heads",),
    ),
    ModelFlag(
        "hidden_dim", whole(1, 2**18),
        "width of the feed-forward layer, of one expert in a mixture; by default 8/3 dim, rounded up to --multiple_of",
        ("--intermediate_size",),
    ),
    ModelFlag("multiple_of", whole(1, 2**16), "see --hidden_dim"),
    ModelFlag("norm_eps", real(1e-12, 0.1), "added to the mean square in RMSNorm", ("--rms_norm_eps",)),
    ModelFlag("qk_norm", parse_bool, "RMSNorm on every query and key head, as in minimind-3 and Qwen3"),
    ModelFlag("rope_theta", real(1, 1e12), "base of the rotary wavelengths"),
    ModelFlag(
        "rope_scaling", parse_rope_scaling,
        f"stretch the positions for a longer context: TYPE:FACTOR, TYPE one of {', '.join(ROPE_SCALING_TYPES)}, e.g. "
        "linear:2; yarn:FACTOR:TRAINED[:ATTENTION] also needs the length trained on, e.g. yarn:4:512, and may set the "
        "factor of cos and sin (0.1 ln(FACTOR) + 1)",
    ),
    ModelFlag("max_seq_len", whole(16, 2**20), "the longest context that the model is meant for, in tokens"),
    ModelFlag("use_moe", parse_bool, "mixture of experts instead of one feed-forward layer in each block"),
    ModelFlag("n_routed_experts", whole(1, 1024), "experts to choose from", ("--num_experts",)),
    ModelFlag("num_experts_per_tok", whole(1, 1024), "routed experts that each token visits"),
    ModelFlag("n_shared_experts", parse_bool, "each token also visits one expert that is always on"),
    ModelFlag("norm_topk_prob", parse_bool, "the weights of a token's experts sum to one"),
    ModelFlag("aux_loss_alpha", real(0, 100), "weight of the load-balancing loss, summed over layers"),
    ModelFlag("seq_aux", parse_bool, "balance the experts within each sequence instead of over the whole batch"),
    ModelFlag("dropout", real(0, 1, below=True), "dropout probability; 0 for one-epoch runs"),
    ModelFlag("flash_attn", parse_bool, "PyTorch's fused attention; False: the textbook formula, slower"),
)  # fmt: skip


def add_model_flags(parser, *, leave_out: tuple[str, ...] = ()) -> None:
    """Every flag that says what model it is; none has a default, which is the model's own: see `settle_model`."""
    parser.add_argument(
        "--model", choices=sorted(PUBLISHED), metavar="NAME",
        help=f"all sizes of a published model: {', '.join(PUBLISHED)}",
    )  # fmt: skip
    defaults = config_fields(LMConfig())
    for flag in MODEL_FLAGS:
        if flag.field in leave_out:
            continue
        names = [f"--{flag.name}", *flag.aliases]
        default = defaults[flag.field]
        text = flag.help if default is None else f"{flag.help} ({default} for new weights)"
        if flag.type is parse_bool:
            add_bool_flag(parser, *names, default=None, help=text)
        else:
            metavar = "TYPE:FACTOR" if flag.type is parse_rope_scaling else "N"
            parser.add_argument(*names, dest=flag.name, type=flag.type, metavar=metavar, help=text)


def add_tokenizer_flag(parser) -> None:
    """`--tokenizer_path`: see vocabulary.py for what is used without it."""
    parser.add_argument(
        "--tokenizer_path", type=non_empty, metavar="DIR",
        help="the tokenizer that the weights were trained with, where they do not bring or name their own",
    )  # fmt: skip


def given_fields(args: Namespace, prefix: str = "") -> tuple[dict[str, Given], list[str]]:
    """What the model flags say, and where --model says something else than another one.

    Args:
        prefix: of the flags' names, "teacher_" in distillation.
    """
    given = {}
    for flag in MODEL_FLAGS:
        name = prefix + flag.name
        value = getattr(args, name, None)
        if value is not None:
            given[flag.field] = Given(value, f"--{name} {value}")
    model = getattr(args, f"{prefix}model", None)
    if model is None:
        return given, []
    published = LMConfig(**PUBLISHED[model])
    problems = contradictions(published, given, f"--{prefix}model {model}")
    for flag in MODEL_FLAGS:
        value = getattr(published, flag.field)
        given.setdefault(flag.field, Given(value, f"--{prefix}model {model} ({flag.field} {value})"))
    return given, problems


class Settled(NamedTuple):
    """What the flags and the weights say together.

    config: of the model; weights: the file to read, which may be missing, or None for random weights; remarks: what to
    tell the user; problems: why it cannot be (config is then some possible one, for the checks that follow).
    """

    config: LMConfig
    weights: Path | None
    remarks: list[str]
    problems: list[str]


def settle_model(
    args: Namespace, weight: str | Path, *, prefix: str = "", sizes: Mapping[str, int] | None = None
) -> Settled:
    """Find the weights that `weight` names, take the sizes from there, and make every model flag say what it is.

    After this `args.dim` and the other model flags are no longer None. A contradiction is a problem, told with both
    values. Missing weights are none here: whoever loads them knows the command that makes them.

    Args:
        weight: a stage's name, whose file is looked for in `args.out_dir`; a .pth file, a folder of transformers or a
            GGUF file, which a Path always is; or "none", for random weights.
        prefix: of the flags' names, "teacher_" in distillation.
        sizes: of new weights and of the usual file, where they are not LMConfig's defaults.
    """
    usual = config_fields(LMConfig(**(sizes or {})))
    given, problems = given_fields(args, prefix)
    config, weights, remarks = LMConfig(**usual), None, []
    try:
        if weight != "none":
            weights, remarks = find_weights(args.out_dir, weight, given, prefix, usual)
        if weights is not None and os.path.exists(weights):
            config, more = describe(weights, given)
            remarks += more
        else:
            values = {name: value for name, (value, _) in given.items()}
            config = LMConfig(**{**usual, **values})
    except (ValueError, OSError) as error:
        problems.append(str(error))
    for flag in MODEL_FLAGS:
        if hasattr(args, prefix + flag.name):
            setattr(args, prefix + flag.name, getattr(config, flag.field))
    return Settled(config, weights, remarks, problems)


def find_weights(
    out_dir: str | Path, weight: str | Path, given: Mapping[str, Given], prefix: str, usual: Mapping[str, object]
) -> tuple[Path, list[str]]:
    """The file that a stage's name means, and remarks; a path is taken as it is.

    File names show the width and whether it is a mixture.
    Of several that fit the flags, the one of the usual size is taken: full_sft_512.pth, not full_sft_768.pth.
    Raises: ValueError: there are several, and none is of the usual size; with the flags that pick each.
    """
    if isinstance(weight, Path) or is_path(weight):
        return Path(weight), []
    dim, use_moe = (given[name].value if name in given else usual[name] for name in ("dim", "use_moe"))
    usual_file = Path(out_dir, weights_name(weight, dim, use_moe))
    stem = Path(out_dir, weight)
    found, flags = [], []
    for path in sorted(stem.parent.glob("*.pth")) if os.path.isdir(stem.parent) else []:
        size = re.fullmatch(re.escape(stem.name) + r"_(\d+)(_moe)?\.pth", path.name)
        if size is None:
            continue
        has = {"dim": int(size[1]), "use_moe": bool(size[2])}
        if all(given[name].value == has[name] for name in has if name in given):
            found.append(path)
            flags.append(f"{path.name} (--{prefix}dim {has['dim']}{f' --{prefix}use_moe True' * has['use_moe']})")
    if usual_file in found:
        others = [text for path, text in zip(found, flags, strict=True) if path != usual_file]
        return usual_file, [f"{usual_file} is used; {out_dir} also holds {', '.join(others)}"] if others else []
    if len(found) > 1:
        raise ValueError(f"{out_dir} holds several {weight}: {', '.join(flags)}: pass the flags of one")
    return found[0] if found else usual_file, []
