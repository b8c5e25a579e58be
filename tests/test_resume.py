"""What --resume continues, what it refuses, and the command that it tells."""

import sys
from pathlib import Path

import pytest
from test_loop import states
from toy import toy_model, toy_train

from training.checkpoint import DifferentRunError, compare, list_states, read_state
from training.saver import launch_command

DIRECTORY = "checkpoints/toy_16"


def resume_error(capsys, out, *flags) -> str:
    with pytest.raises(SystemExit) as stopped:
        toy_train(out, *flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_resume_without_a_state(tmp_path, capsys):
    assert "start without --resume" in resume_error(capsys, tmp_path, "--resume")
    toy_train(tmp_path, "--resume", "auto", "--max_steps", "2")
    assert "starts anew" in capsys.readouterr().out


def test_flags_that_change_the_result_are_refused_by_name(trained, capsys):
    out, _ = trained
    flags = ["--learning_rate", "1e-3", "--seed", "3", "--batch_size", "3", "--log_interval", "7", "--resume"]
    message = resume_error(capsys, out, *flags)
    for part in ("learning_rate: 0.0005 then, 0.001 now", "seed: 1337 then, 3 now", "batch_size: 2 then, 3 now"):
        assert part in message
    assert "log_interval" not in message and "--from_weight" in message


def test_a_refused_adapter_is_not_called_weights_to_start_from():
    directory, adapter = Path("out/checkpoints/lora/medical_512"), Path("out/lora/medical_512.pth")
    flags = {"lora_name": "medical", "seed": 1}
    with pytest.raises(DifferentRunError, match="another --lora_name than medical, which keeps out/lora") as refused:
        compare(flags, {**flags, "seed": 2}, directory, adapter)
    assert "--from_weight" not in str(refused.value)


def test_another_model_or_other_data_is_refused(trained, capsys):
    out, _ = trained
    with pytest.raises(SystemExit):
        toy_train(out, "--resume", model=toy_model(dropout=0.2))
    assert "dropout: 0.1 then, 0.2 now" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in out.rglob("*.p*t*")}
    for resume in ("True", "auto"):
        with pytest.raises(SystemExit):
            toy_train(out, "--resume", resume, model=toy_model(n_layers=1, dropout=0.1))
        assert "n_layers: 2 then, 1 now" in capsys.readouterr().err, "auto does not start another model over this one"
    assert {path: path.read_bytes() for path in out.rglob("*.p*t*")} == before


def test_harmless_and_rounding_differences_are_told(trained, tmp_path, capsys):
    out, good = trained
    target = tmp_path / DIRECTORY
    target.mkdir(parents=True)
    (target / states(out)[0].name).write_bytes(good)
    toy_train(tmp_path, "--resume", "--log_interval", "7", "--threads", "1")
    printed = capsys.readouterr().out
    assert "log_interval: 5 then, 7 now (harmless)" in printed
    assert "threads: 0 then, 1 now (exact up to rounding from here on)" in printed


def test_a_fresh_start_sets_the_old_states_aside_only_when_it_saves(tmp_path, capsys):
    """Else the old run's later states would look newer than the new run's, and the new ones would be deleted."""
    toy_train(tmp_path, "--save_interval", "5")
    old = {path.name: path.read_bytes() for path in states(tmp_path)}
    toy_train(tmp_path, "--seed", "2", "--max_steps", "3")
    printed = capsys.readouterr().out
    assert "add --resume" in printed and "toy_16.previous" in printed
    assert {p.name: p.read_bytes() for p in list_states(tmp_path / f"{DIRECTORY}.previous")} == old
    assert len(states(tmp_path)) == 1
    assert read_state(states(tmp_path)[0])["identity"]["seed"] == 2


@pytest.mark.parametrize(
    ("argv", "environment", "expected"),
    [
        ("train.py --dim 64 --resume", {}, "python train.py --dim 64 --resume"),
        ("train.py --resume auto --dim 64", {}, "python train.py --dim 64 --resume"),
        ("train.py --resume --dim 64", {}, "python train.py --dim 64 --resume"),
        ("train.py --from_resume 1 --dim 64", {}, "python train.py --dim 64 --resume"),
        ("train.py --from_resume=1", {}, "python train.py --resume"),
        (
            "train.py --dim 64",
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 train.py --dim 64 --resume",
        ),
        (
            "train.py",
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2",
             "GROUP_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
            "torchrun --nproc_per_node 8 --nnodes 2 --node_rank 1 --rdzv_backend c10d --rdzv_endpoint 10.0.0.1:29500 "
            "train.py --resume",
        ),
        (
            "train.py --local_rank=1 --dim 64",
            {"CROSS_SIZE": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "2"},
            "deepspeed --num_gpus 2 train.py --dim 64 --resume",
        ),
    ],
)  # fmt: skip
def test_the_command_that_continues_has_the_form_of_the_launch(argv, environment, expected, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", argv.split())
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    assert launch_command() == expected
    assert launch_command(resume=False) == expected.removesuffix(" --resume")
