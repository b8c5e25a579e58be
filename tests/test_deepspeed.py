"""ZeRO on two gloo processes makes the run that plain data parallelism makes."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from test_distributed import ROOT, as_ranks
from test_loop import interrupt_at
from toy import largest_difference, toy_args, toy_model, toy_train

from training.cli import is_installed
from training.report import read_log
from training.runtime import distributed_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed("deepspeed"), reason="needs: pip install deepspeed"),
]
FLAGS = ["--max_steps", "20", "--log_interval", "1", "--accumulation_steps", "3", "--epochs", "9"]
STAGES = ("1", "2", "3")


def work_of_two(out: Path, ports) -> None:
    os.environ["MASTER_PORT"] = next(ports)
    with distributed_run(toy_args(out)) as run:  # one for all: DeepSpeed remembers the first process group
        toy_train(out / "plain", *FLAGS, run=run, dropout=0.0)
        for stage in STAGES:
            flags = [*FLAGS, "--deepspeed", str(ROOT / "configs" / f"zero{stage}.json")]
            toy_train(out / stage, *flags, run=run, dropout=0.0)
            try:
                toy_train(out / f"{stage}-continued", *flags, run=run, dropout=0.0, loss_fn=interrupt_at(24))
            except SystemExit as stopped:
                assert stopped.code == 128 + signal.SIGTERM
            run.stop_signal = 0
            toy_train(out / f"{stage}-continued", *flags, "--resume", run=run, dropout=0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("zero")
    as_ranks(work_of_two, 2, out)
    return out


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for path in (folder / "logs").glob("*.jsonl") for r in read_log(path) if "loss" in r}


def weights(folder: Path) -> dict:
    return torch.load(folder / "toy_16.pth", weights_only=True)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_equals_plain_data_parallelism(runs, stage):
    plain, zero = losses(runs / "plain"), losses(runs / stage)
    assert len(plain) == 20 and zero.keys() == plain.keys()
    assert max(abs(plain[step] - zero[step]) for step in plain) < 1e-4
    assert largest_difference(weights(runs / "plain"), weights(runs / stage)) < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_saved_weights_load_strictly(runs, stage):
    toy_model().load_state_dict(weights(runs / stage), strict=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_continues_where_it_was(runs, stage):
    straight, continued = losses(runs / stage), losses(runs / f"{stage}-continued")
    assert continued.keys() == straight.keys()
    assert max(abs(straight[step] - continued[step]) for step in straight) < 1e-5
    assert largest_difference(weights(runs / stage), weights(runs / f"{stage}-continued")) < 1e-5


def test_a_run_goes_on_without_deepspeed(runs, capsys):
    toy_train(runs / "3-continued", *FLAGS, "--accumulation_steps", "6", "--resume", dropout=0.0)
    assert "already complete" in capsys.readouterr().out


def test_a_wrong_config_is_a_plain_error(tmp_path):
    from training.deepspeed import complete_config

    path = tmp_path / "ds.json"
    for content, part in (("{", "not JSON"), (json.dumps({"zero_optimization": {"stage": 4}}), "must be 1, 2 or 3")):
        path.write_text(content)
        with pytest.raises(ValueError, match=part):
            complete_config(toy_args(tmp_path, "--deepspeed", str(path)), torch.float32)
