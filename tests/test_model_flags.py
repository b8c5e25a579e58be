"""Which model the flags and the weights mean together: sizes need not be given, and may not contradict."""

import shutil
from pathlib import Path

import pytest
import torch
from toy import toy_run

import eval_model
import train_distillation
import train_full_sft
import train_lora
import train_pretrain
from model.LMConfig import PUBLISHED, LMConfig, config_fields
from model.loading import save_weights, weights_path
from model.model import MiniMindForCausalLM
from model.model_flags import MODEL_FLAGS
from model.record import record_path, write_record
from training.checkpoint import DifferentRunError, compare
from training.processes import other_model

SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 1e4}


def save(out_dir: Path, stage: str = "pretrain", **changes) -> Path:
    """Weights of a stage, with their record."""
    torch.manual_seed(0)
    config = LMConfig(**{**SMALL, **changes})
    path = weights_path(out_dir, stage, config)
    save_weights(MiniMindForCausalLM(config).state_dict(), path)
    write_record(path, config)
    return path


def parse(script, out_dir: Path, flags: str = ""):
    return script.parse_args(["--out_dir", str(out_dir), *flags.split()])


def refused(capsys, script, out_dir: Path, flags: str = "") -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        parse(script, out_dir, flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[1:-1]


# From the weights


def test_every_stage_takes_the_sizes_from_the_weights_that_it_reads(tmp_path):
    save(tmp_path)
    save(tmp_path, "full_sft")
    for script in (train_full_sft, train_lora):
        args = parse(script, tmp_path)
        assert {name: getattr(args.config, name) for name in SMALL} == SMALL
        assert {name: getattr(args, name) for name in SMALL} == SMALL  # what the flags would have said
        assert args.hidden_dim is None and args.remarks == []
    choice = parse(eval_model, tmp_path).choice
    assert choice.path == args.start_weights == tmp_path / "full_sft_32.pth" and choice.remarks == ()
    assert config_fields(choice.config) == config_fields(args.config)


def test_settings_of_a_run_are_its_own(tmp_path):
    save(tmp_path, dropout=0.25, aux_loss_alpha=0.5, max_seq_len=300)
    args = parse(train_full_sft, tmp_path, "--max_seq_len 64")
    assert (args.config.dropout, args.dropout, args.config.aux_loss_alpha, args.config.max_seq_len) == (0, 0, 0.01, 300)
    assert args.max_seq_len == 64  # where the data is cut
    args = parse(train_full_sft, tmp_path, "--dropout 0.5 --max_position_embeddings 100 --rope_scaling linear:2")
    assert (args.config.dropout, args.config.max_seq_len, args.config.rope_scaling["factor"]) == (0.5, 100, 2)


def test_new_weights_have_the_default_sizes(tmp_path):
    save(tmp_path)
    args = parse(train_pretrain, tmp_path)
    assert config_fields(args.config) == config_fields(LMConfig()) and args.start_weights is None
    assert (args.dim, args.n_layers, args.use_moe, args.dropout) == (512, 8, False, 0.0)


def test_a_file_anywhere_is_taken_as_it_is(tmp_path):
    path = save(tmp_path / "a").rename(tmp_path / "mine.pth")
    args = parse(train_full_sft, tmp_path / "b", f"--from_weight {path}")
    assert (args.dim, args.start_weights) == (32, path)
    (remark,) = args.remarks  # its record was left behind
    assert "n_heads 8" in remark and "mine.pth has no mine.json beside it" in remark


def test_missing_weights_are_left_to_whoever_loads_them(tmp_path):
    args = parse(train_full_sft, tmp_path / "nowhere", "--dim 64")
    assert args.config.dim == 64 and args.start_weights == tmp_path / "nowhere" / "pretrain_64.pth"


# Contradictions


def test_a_flag_against_the_weights(tmp_path, capsys):
    path = save(tmp_path)
    assert refused(capsys, train_full_sft, tmp_path, "--n_layers 8") == [
        f"  --n_layers 8 contradicts n_layers 2 of {path} (as its record says): leave it out, or name other weights"
    ]
    (problem,) = refused(capsys, train_full_sft, tmp_path, "--n_heads 8 --rope_theta 1e6")
    assert "--n_heads 8 contradicts n_heads 4" in problem and "--rope_theta 1000000.0 contradicts" in problem
    parse(train_full_sft, tmp_path, "--n_heads 4 --rope_theta 10000")


def test_a_published_model_against_the_weights(tmp_path, capsys):
    path = save(tmp_path, **PUBLISHED["MiniMind2-Small"], n_heads=8, rope_theta=1e6)
    parse(train_full_sft, tmp_path, "--model MiniMind2-Small")
    (problem,) = refused(capsys, train_full_sft, tmp_path, f"--model minimind-3 --from_weight {path}")
    assert f"--model minimind-3 (dim 768) contradicts dim 512 of {path} (as its record says)" in problem
    assert "--model minimind-3 (qk_norm True) contradicts qk_norm False" in problem
    assert "; --model minimind-3 (hidden_dim 2432) contradicts hidden_dim 1408" in problem  # named once


def test_a_published_model_against_a_flag(tmp_path, capsys):
    problems = refused(capsys, train_pretrain, tmp_path, "--model minimind-3 --dim 512 --n_heads 16 --hidden_dim 2048")
    assert problems == [
        "  --dim 512 contradicts dim 768 of --model minimind-3",
        "  --n_heads 16 contradicts n_heads 8 of --model minimind-3",
        "  --hidden_dim 2048 contradicts hidden_dim 2432 of --model minimind-3",
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_a_name(name, tmp_path):
    args = parse(train_pretrain, tmp_path, f"--model {name} --dropout 0.5")
    assert config_fields(args.config) == config_fields(LMConfig(**PUBLISHED[name], dropout=0.5))
    choice = parse(eval_model, tmp_path, f"--model {name}").choice
    assert config_fields(choice.config) == config_fields(LMConfig(**PUBLISHED[name]))


def test_every_field_is_a_flag_or_not_the_users():
    fields = {flag.field for flag in MODEL_FLAGS}
    assert len(fields) == len(MODEL_FLAGS)
    assert set(config_fields(LMConfig())) - fields == {
        *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"),  # the tokenizer's
        *("scoring_func", "tie_word_embeddings", "use_cache"),  # one value only; the caller's
    }


def test_every_flag_reaches_the_configuration(tmp_path):
    values = {
        **{"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 40, "multiple_of": 32},
        **{"norm_eps": 1e-6, "qk_norm": True, "rope_theta": 500.0, "max_seq_len": 99, "use_moe": True},
        **{"n_routed_experts": 3, "num_experts_per_tok": 1, "n_shared_experts": False, "norm_topk_prob": False},
        **{"aux_loss_alpha": 0.5, "seq_aux": False, "dropout": 0.5, "flash_attn": False},
    }
    words = ["--rope_scaling linear:2"]
    for flag in MODEL_FLAGS:
        if flag.field in values:
            words.append(f"--{flag.name} {values[flag.field]}")
    config = parse(train_pretrain, tmp_path, " ".join(words)).config
    expected = {**values, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert set(expected) == {flag.field for flag in MODEL_FLAGS}
    assert {name: getattr(config, name) for name in expected} == expected


# Several candidates


def test_the_usual_size_is_taken_and_the_others_are_named(tmp_path):
    usual = save(tmp_path, dim=512, n_layers=1)
    save(tmp_path)
    save(tmp_path, dim=64, use_moe=True)
    (tmp_path / "pretrain_x.pth").touch()  # no size
    args = parse(train_full_sft, tmp_path)
    assert args.start_weights == usual
    others = "pretrain_32.pth (--dim 32), pretrain_64_moe.pth (--dim 64 --use_moe True)"
    assert args.remarks == [f"{usual} is used; {tmp_path} also holds {others}"]
    assert parse(train_full_sft, tmp_path, "--dim 32").remarks == []


def test_several_unusual_sizes_are_listed_with_the_flags_that_pick_each(tmp_path, capsys):
    small, mixture = save(tmp_path), save(tmp_path, dim=64, use_moe=True)
    (problem,) = refused(capsys, train_full_sft, tmp_path)
    assert problem == (
        f"  {tmp_path} holds several pretrain: pretrain_32.pth (--dim 32), "
        "pretrain_64_moe.pth (--dim 64 --use_moe True): pass the flags of one"
    )
    assert refused(capsys, eval_model, tmp_path, "--model_mode 0") == [problem]
    assert parse(train_full_sft, tmp_path, "--dim 32").start_weights == small
    assert parse(train_full_sft, tmp_path, "--dim 64 --use_moe True").start_weights == mixture
    assert parse(train_full_sft, tmp_path, "--use_moe True").start_weights == mixture  # the only one left
    assert parse(eval_model, tmp_path, "--model_mode 0 --use_moe False").choice.path == small


# Distillation: a student and a teacher


def test_student_and_teacher_are_found_each_by_itself(tmp_path):
    save(tmp_path, "full_sft")
    args = parse(train_distillation, tmp_path, "--from_weight none --dim 16 --n_layers 1")
    assert (args.config.dim, args.start_weights) == (16, None)
    assert (args.teacher_config.dim, args.teacher_dim, args.teacher_n_layers) == (32, 32, 2)
    assert args.teacher_config.rope_theta == 1e4 and args.teacher_weights == tmp_path / "full_sft_32.pth"


def test_the_teacher_of_several(tmp_path, capsys):
    for dim in (32, 64):
        save(tmp_path, "full_sft", dim=dim)
    (problem,) = refused(capsys, train_distillation, tmp_path, "--from_weight none")
    assert problem.startswith(f"  the teacher: {tmp_path} holds several full_sft: full_sft_32.pth (--teacher_dim 32)")
    args = parse(train_distillation, tmp_path, "--dim 32 --teacher_dim 64")
    assert (args.config.dim, args.teacher_config.dim) == (32, 64)
    (problem,) = refused(capsys, train_distillation, tmp_path, "--dim 32 --teacher_dim 64 --teacher_n_layers 3")
    assert "the teacher: --teacher_n_layers 3 contradicts n_layers 2 of" in problem


def test_a_student_is_not_taught_by_itself_unasked(tmp_path, capsys):
    save(tmp_path, "full_sft")
    (problem,) = refused(capsys, train_distillation, tmp_path)
    assert "is what the student starts from, and no other is there: pass --teacher_dim" in problem
    assert parse(train_distillation, tmp_path, "--teacher_dim 32").teacher_config.dim == 32


# States


def test_a_state_of_a_version_with_fewer_flags_is_continued(tmp_path):
    """It knows neither --n_heads nor --model, and its configuration holds things that are no fields."""
    config = LMConfig(dim=64)
    saved = {"dim": 64, "use_moe": False, "max_seq_len": 100, "seed": 1, "config": config.to_dict()}
    args = parse(train_pretrain, tmp_path, "--dim 64 --max_seq_len 100 --seed 1")
    flags = {flag.name: getattr(args, flag.name) for flag in MODEL_FLAGS}
    now = {**flags, "max_seq_len": 100, "seed": 1, "config": config_fields(args.config)}
    assert compare(saved, now, tmp_path, tmp_path) == []
    for changes, line in (
        ({"n_heads": 4}, "n_heads: 8 then, 4 now"),
        ({"rope_theta": 1e4}, "rope_theta: 1000000.0 then"),
    ):
        other = {**now, "config": config_fields(LMConfig(dim=64, **changes))}
        with pytest.raises(DifferentRunError, match=line):
            compare(saved, other, tmp_path, tmp_path)
    with pytest.raises(DifferentRunError, match="max_seq_len: 100 then, 200 now"):
        compare(saved, {**now, "max_seq_len": 200}, tmp_path, tmp_path)


def test_ranks_that_found_other_weights_are_refused(tmp_path, monkeypatch):
    """Each machine looks into its own out/."""
    run, config = toy_run(), LMConfig()
    assert other_model(run, config) is None
    monkeypatch.setattr(run, "gather", lambda fields: [fields, fields, {**fields, "dim": 768}])
    assert other_model(run, config).startswith("rank 2 found weights with dim 768, rank 0 with 512: copy")


def test_a_record_that_belongs_elsewhere_is_told_when_flags_are_read(tmp_path):
    other = save(tmp_path / "other", rope_theta=777.0)
    here = save(tmp_path)
    shutil.copy(record_path(other), record_path(here))
    args = parse(train_full_sft, tmp_path)
    assert args.config.rope_theta == 777.0 and args.remarks == []  # the same seed: these are the same weights
    save(tmp_path / "other", dim=16, n_heads=2)
    shutil.copy(tmp_path / "other" / "pretrain_16.json", record_path(here))
    args = parse(train_full_sft, tmp_path)
    assert args.config.dim == 32 and "was written for other weights" in args.remarks[0]
