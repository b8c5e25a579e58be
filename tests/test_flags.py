"""Every flag of every script, fed with every nonsense: it parses, or one message names flag, value and limit."""

import argparse
import importlib.util
import re
import sys

import pytest

import eval_model
import train_distill_reason
import train_distillation
import train_dpo
import train_full_sft
import train_lora
import train_pretrain
from common import flags
from common.flags import BriefParser, Problem, file_name, non_empty, one_of_these, parse_bool, plain_errors, real, whole
from model.loading import REPO_ROOT

NONSENSE = [
    "nan", "inf", "-inf", "-1", "0", "1e300", "-1e300", "1e-300", "1e-45", "", " ", "../x", "/tmp/x", "模型",
    "x\0y", "\n", str(10**30), "9" * 5000, "None", "[]",
]  # fmt: skip


def load_script(name: str):
    """A module in scripts/, which is no package; its own directory is on the path while it runs."""
    path = REPO_ROOT / "scripts" / f"{name}.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


SCRIPTS = {
    **{module.__name__: module.parse_args for module in (train_pretrain, train_full_sft, train_dpo, train_lora)},
    **{module.__name__: module.parse_args for module in (train_distill_reason, train_distillation, eval_model)},
    **{name: load_script(name).parse_args for name in ("convert_model", "train_tokenizer", "make_sample_data")},
}
NEEDED = {"convert_model": ["SRC", "DST"], "train_tokenizer": ["--data_path", __file__]}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Weights in out/ of this checkout would say other sizes than the defaults."""
    monkeypatch.chdir(tmp_path)


def parser_of(name: str, monkeypatch) -> BriefParser:
    """The parser that a script's parse_args makes."""
    made = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", lambda self, *_: made.append(self) or sys.exit(0))
    with pytest.raises(SystemExit):
        SCRIPTS[name]([])
    monkeypatch.undo()
    return made[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/a b"), "/a b: Permission denied; get the permission"),
        (OSError(36, "File name too long", "x" * 5000), "x" * 200 + "...: File name too long; a name may have 255"),
        (OSError(28, "no room for the cache"), "no room for the cache"),
        (FileNotFoundError("x.pth not found: run this"), "x.pth not found: run this"),
        (ValueError("bad"), "bad"),
    ],
)
def test_errors_of_the_system_say_what_to_do(error, message, capsys):
    """It was "[Errno 13] Permission denied: '/a b'"."""
    with pytest.raises(SystemExit), plain_errors():
        raise error
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_nonsense_parses_or_is_told_with_flag_value_and_limit(name, monkeypatch, capsys):
    """`--seed -1`, `--lora_dropout 1e30`, `--tag_weight 1e300`, `--save_weight ../x`: tracebacks once."""
    for action in filter(lambda action: action.option_strings, parser_of(name, monkeypatch)._actions):
        flag = action.option_strings[0]
        takes_a_value = action.nargs != 0
        for value in NONSENSE if takes_a_value and not isinstance(action, argparse._HelpAction) else []:
            try:
                parsed = SCRIPTS[name]([*NEEDED.get(name, []), flag, value])
            except SystemExit as stopped:
                error = capsys.readouterr().err
                assert stopped.code == 2 and action.dest in error, (flag, value, error)
                shown = (value[:50], repr(value)[:50], repr(value[:50])[:-1])
                assert any(form in error for form in shown), (flag, value, error)
                assert re.search("must|choose|use|invalid|is not|no such|package|allowed|give|name", error), error
            else:
                number = getattr(parsed, action.dest, None)
                assert not isinstance(number, Problem), (flag, value)
                if isinstance(number, int | float):
                    assert -1 <= number <= 2**63, (flag, value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_declares_its_limits(name, monkeypatch):
    """No bare int, float or str: `''` is no path, and nan is no number that one can train with."""
    for action in parser_of(name, monkeypatch)._actions:
        free = action.nargs == 0 or action.choices or action.dest in ("prompt", "help")
        assert free or action.type not in (None, int, float, str), action.option_strings


def test_all_problems_are_told_at_once_those_between_flags_too(capsys):
    argv = "--seed -1 --grad_clip 1e-30 --beta nan --loss_type ipo --label_smoothing 0.1 --dim 100 --save_weight ../x"
    with pytest.raises(SystemExit):
        train_dpo.parse_args(argv.split())
    error = capsys.readouterr().err
    parts = ("--seed -1: must be a whole number from 0 to", "--grad_clip 1e-30: must be 0 or a number from 0.001",
             "--beta nan: must", "--label_smoothing 0.1: must be 0", "dim=100", "--save_weight ../x: must")  # fmt: skip
    assert all(part in error for part in parts), error


def test_unknown_flags_are_told_with_all_other_problems(capsys):
    """argparse left at the first unknown word, so that a typo hid what else was wrong."""
    argv = "word --lerning_rate 1e-3 --sead=1 --epochs 0 --qqq --dim 100 --grad_clip 1e-30"
    with pytest.raises(SystemExit) as stopped:
        train_pretrain.parse_args(argv.split())
    problems = capsys.readouterr().err.splitlines()[1:-1]
    assert stopped.value.code == 2
    assert problems[:4] == [
        "  word: belongs to no flag",
        "  --lerning_rate: there is no such flag; did you mean --learning_rate?",
        "  --sead: there is no such flag; did you mean --seed?",
        "  --qqq: there is no such flag",
    ]
    assert [problem.split(":")[0] for problem in problems[4:6]] == ["  --epochs 0", "  --grad_clip 1e-30"]
    assert len(problems) == 7 and "dim=100" in problems[6]


@pytest.mark.parametrize(
    ("parse", "values"),
    [
        (train_lora.parse_args, ["--lora_alpha 0", "--lora_dropout -1", "--lora_dropout 1e30", "--lora_rank 513",
                                 "--lora_targets q_proj,x", "--save_weight me", "--lora_name /tmp/x"]),
        (train_distill_reason.parse_args, ["--tag_weight 1e300", "--tag_weight 0"]),
        (train_distillation.parse_args, ["--temperature 1e300", "--temperature 0", "--teacher_dim 100"]),
        (train_pretrain.parse_args, ["--threads 100000", "--learning_rate 0", "--learning_rate 1e39", "--dropout 1"]),
    ],
)  # fmt: skip
def test_what_would_train_nothing_or_crash_is_refused(parse, values, capsys):
    for command in values:
        with pytest.raises(SystemExit) as stopped:
            parse(command.split())
        assert stopped.value.code == 2 and command.split()[-1] in capsys.readouterr().err, command


def test_the_types():
    assert whole(1, 5)("5") == 5 and whole(0, 2**63)(" 7 ") == 7
    assert real(0, 1)("1e-3") == 1e-3 and real(0, 1)("1") == 1
    assert isinstance(real(0, 1, below=True)("1"), Problem) and real(1e-3, 1, or_zero=True)("0") == 0
    assert file_name("模型-v1.2") == "模型-v1.2" and non_empty("out/../x") == "out/../x"
    assert one_of_these(("a", "b"))("b, a") == ("b", "a")
    assert str(parse_bool("maybe")) == "maybe: is not a yes or a no: write True, False, 1 or 0"
    for name in ("", " ", "a/b", "a\\b", "..", ".hidden", "a\nb", "x" * 101, "con:", "\ud800"):
        assert isinstance(file_name(name), Problem), name
    assert str(flags.problem("", "must not be empty")) == "'': must not be empty"
    assert str(flags.problem("9" * 99, "x")) == "9" * 60 + "...: x"


def test_the_help_named_is_the_script_as_it_was_called(monkeypatch, capsys):
    """`python eval_lm.py --help` does not find scripts/eval_lm.py."""
    monkeypatch.setattr(sys, "argv", ["scripts/train_tokenizer.py"])
    with pytest.raises(SystemExit):
        SCRIPTS["train_tokenizer"](["--qqq"])
    assert "`python scripts/train_tokenizer.py --help` explains every flag" in capsys.readouterr().err
