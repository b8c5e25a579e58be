"""The shared flags: what parses, what is refused before any work, and that every flag is read by something."""

import re
from pathlib import Path

import pytest

from common.flags import is_installed, parse_bool, plain_errors
from model.model_flags import MODEL_FLAGS
from training.cli import config_from, find_problems, stage_parser

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*ROOT.glob("training/*.py"), *ROOT.glob("train_*.py")]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Weights in out/ of this checkout would say other sizes than the defaults."""
    monkeypatch.chdir(tmp_path)


def parser():
    return stage_parser("test", data_path="data.jsonl", save_weight="pretrain")


def parse(command: str):
    return parser().parse_args(command.split())


def refused(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(command)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# Booleans


@pytest.mark.parametrize(
    ("flags", "value"),
    [("", False), ("--use_moe", True)]
    + [(f"--use_moe {word}", True) for word in ("True", "true", "1", "yes")]
    + [(f"--use_moe {word}", False) for word in ("False", "false", "0", "no")],
)
def test_use_moe_false_is_dense(flags, value):
    """Upstream A4: type=bool read `--use_moe False` as True."""
    args = parse(flags)
    assert args.use_moe is value and config_from(args).use_moe is value


def test_parse_bool_refuses_other_words(capsys):
    assert parse_bool("") is False
    assert "--use_moe maybe: is not a yes or a no" in refused("--use_moe maybe", capsys)


@pytest.mark.parametrize(("flags", "value"), [("", False), ("--resume", True), ("--resume auto", "auto")])
def test_resume(flags, value):
    assert parse(flags).resume == value
    assert parse("--from_resume 1").resume is True and parse("--from_resume 0").resume is False


# Upstream's commands


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--local_rank 1 --ddp",
        "--local-rank=0",
        "--epochs 1 --batch_size 32 --learning_rate 5e-4 --device cpu --dtype bfloat16 --wandb_project P "
        "--num_workers 1 --ddp --accumulation_steps 8 --grad_clip 1.0 --warmup_iters 0 --log_interval 100 "
        "--save_interval 100 --local_rank -1 --dim 512 --n_layers 8 --max_seq_len 512 --use_moe False "
        "--data_path x.jsonl --out_dir out",
        "--save_dir ../out --save_weight pretrain --from_weight none --from_resume 1 --use_compile 1 "
        "--hidden_size 768 --num_hidden_layers 8 --use_moe 0 --num_workers 8",
    ],
)
def test_upstreams_flags_and_their_later_names_parse(command):
    parse(command)


def test_later_names_mean_the_same():
    args = parse("--hidden_size 768 --num_hidden_layers 16 --save_dir elsewhere")
    assert (args.dim, args.n_layers, args.out_dir) == (768, 16, "elsewhere")


def test_use_wandb_is_a_tracker(monkeypatch, capsys):
    monkeypatch.setattr("training.cli.is_installed", lambda package: True)
    assert parse("--use_wandb").tracker == "wandb" and parse("").tracker == "none"
    assert parse("--use_wandb --tracker tensorboard").tracker == "tensorboard"
    monkeypatch.setattr("training.cli.is_installed", lambda package: False)
    assert "pip install swanlab" in refused("--tracker swanlab", capsys)


def test_a_folder_named_like_a_package_is_not_the_package(tmp_path, monkeypatch):
    """wandb keeps its offline runs in ./wandb, which Python would take for an empty package."""
    (tmp_path / "nosuchtracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("nosuchtracker") and is_installed("torch")


# Limits


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("--epochs 0", ["--epochs 0", "from 1 to 1000000"]),
        ("--batch_size -3", ["--batch_size -3", "from 1"]),
        ("--learning_rate 0", ["--learning_rate 0", "from 1e-12 to 1"]),
        ("--learning_rate nan", ["--learning_rate nan"]),
        ("--grad_clip nan", ["--grad_clip nan", "0 or a number from 0.001"]),
        ("--heldout_share 0.7", ["--heldout_share 0.7", "below 0.5"]),
        ("--save_minutes -1", ["--save_minutes -1", "from 0"]),
        ("--dim 100", ["100", "8"]),
        ("--dim 100 --epochs 0", ["100", "--epochs 0"]),
        ("--dtype float8", ["float8", "bfloat16"]),
        ("--lr_schedule zigzag", ["zigzag", "cosine"]),
        ("--tracker mlflow", ["mlflow", "tensorboard"]),
        ("--deepspeed nowhere.json", ["nowhere.json", "configs/zero1.json"]),
        ("--max_seq_length 5", ["--max_seq_length"]),
        ("--epochs two", ["two"]),
    ],
)
def test_wrong_values_are_refused_with_value_and_limit(command, parts, capsys):
    message = refused(command, capsys)
    assert all(part in message for part in parts), message


def test_all_problems_are_told_at_once(capsys):
    message = refused("--epochs 0 --batch_size 0 --max_seq_len 1", capsys)
    assert all(name in message for name in ("--epochs", "--batch_size", "--max_seq_len"))


def test_the_defaults_have_no_problem():
    assert find_problems(parse("")) == []


def test_a_misspelt_default_fails_at_once():
    with pytest.raises(KeyError, match="learning_rat"):
        stage_parser("test", learning_rat=1e-3)


# A flag is a debt


def test_every_flag_has_help_and_something_that_reads_it():
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    hidden = {"help", "local_rank", "ddp"}  # launchers pass the last two; the environment says the same
    hidden |= {"model", *(flag.name for flag in MODEL_FLAGS)}  # read together, see tests/test_model_flags.py
    for action in parser()._actions:
        if action.dest not in hidden:
            assert action.help and action.help != "==SUPPRESS==", action.dest
            is_read = re.search(rf"\bargs\.{action.dest}\b|parsed\.{action.dest}\b", code)
            assert is_read, f"nothing reads --{action.dest}"


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "(default: 0.0005)" in text and "{out_dir}" in text


# Errors of the user


@pytest.mark.parametrize("error", [ValueError("x = 5: at most 3"), FileNotFoundError("data.jsonl not found")])
def test_a_users_mistake_is_one_line_and_no_trace(error, capsys):
    with pytest.raises(SystemExit) as stopped, plain_errors():
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"
