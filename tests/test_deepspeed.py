"""ZeRO on two gloo processes makes the run that plain data parallelism makes."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_distributed import ROOT, as_ranks
from test_loop import interrupt_at
from toy import largest_difference, toy_args, toy_model, toy_train

from common.flags import is_installed
from training.checkpoint import list_states, read_state
from training.curves import read_log
from training.processes import distributed_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed("deepspeed"), reason="needs: pip install deepspeed"),
]
FLAGS = ["--max_steps", "20", "--log_interval", "1", "--accumulation_steps", "3", "--epochs", "9"]
STAGES = ("1", "2", "3")


def stopped_in_the_middle(out: Path, *flags: str, run) -> None:
    with contextlib.suppress(SystemExit):  # after saving, in step 8 of 20
        toy_train(out, *flags, run=run, dropout=0.0, loss_fn=interrupt_at(24))
    assert run.stop_signal == signal.SIGTERM
    run.stop_signal = 0


def work_of_two(out: Path, ports) -> None:
    os.environ["MASTER_PORT"] = next(ports)
    with distributed_run(toy_args(out)) as run:  # one for all: DeepSpeed remembers the first process group

        def continued(stopped: str, name: str, *flags: str) -> None:
            if run.is_main:
                shutil.copytree(out / stopped, out / name)
            run.barrier()
            toy_train(out / name, *FLAGS, *flags, "--resume", run=run, dropout=0.0)

        toy_train(out / "plain", *FLAGS, run=run, dropout=0.0)
        stopped_in_the_middle(out / "plain-stopped", *FLAGS, run=run)
        for stage in STAGES:
            zero = ["--deepspeed", str(ROOT / "configs" / f"zero{stage}.json")]
            toy_train(out / stage, *FLAGS, *zero, run=run, dropout=0.0)
            stopped_in_the_middle(out / f"{stage}-stopped", *FLAGS, *zero, run=run)
            continued(f"{stage}-stopped", f"{stage}-continued", *zero)
            continued(f"{stage}-stopped", f"{stage}-continued-plain")
            continued("plain-stopped", f"plain-continued-{stage}", *zero)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("zero")
    as_ranks(work_of_two, 2, out)
    return out


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for path in (folder / "logs").glob("*.jsonl") for r in read_log(path) if "loss" in r}


def last_state(folder: Path) -> dict:
    return read_state(list_states(folder / "checkpoints" / "toy_16")[0])


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
@pytest.mark.parametrize(
    ("straight", "continued"),
    [("{}", "{}-continued"), ("{}", "{}-continued-plain"), ("plain", "plain-continued-{}")],
    ids=["with DeepSpeed", "without", "plain run with DeepSpeed"],
)
def test_a_stopped_run_continues_where_it_was(runs, straight, continued, stage):
    straight, continued = runs / straight.format(stage), runs / continued.format(stage)
    expected, measured = losses(straight), losses(continued)
    assert measured.keys() == expected.keys()
    assert max(abs(expected[step] - measured[step]) for step in expected) < 1e-5
    assert largest_difference(weights(straight), weights(continued)) < 1e-5
    for _, entry in last_state(continued)["updater"]["optimizer"]["state"].items():
        assert entry["step"] == 20


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_counts_its_steps_for_itself(runs, stage):
    """Fused AdamW adds 1 to each parameter's counter: one tensor for all of them would count n parameters a step."""
    counters = [entry["step"] for entry in last_state(runs / stage)["updater"]["optimizer"]["state"].values()]
    assert len({counter.data_ptr() for counter in counters}) == len(counters)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"zero_optimization": [2]}', "must be a JSON object with an object zero_optimization"),
        ('{"zero_optimization": {"stage": 4}}', "stage is 4, must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": [2]}}', r"stage is \[2\], must be"),
        ('{"zero_optimization": {"stage": true}}', "stage is True, must be"),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "x"}}',
            "refused by DeepSpeed: .*reduce_bucket_size",
        ),
        ('{"zero_optimization": {"stage": 2, "no_such": 1}}', "refused by DeepSpeed: .*no_such"),
        ('{"zero_optimization": {"stage": 2}, "activation_checkpointing": [1]}', "refused by DeepSpeed"),
        ('{"zero_optimization": {"stage": 2}, "wall_clock_breakdown": []}', "refused by DeepSpeed"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": 5, "fp16": "x"}', "leave out optimizer, fp16: the flags"),
    ],
)
def test_a_wrong_config_is_a_plain_error_before_any_work(tmp_path, content, part):
    """Wrong types ended in AttributeError and TypeError, after the data had been tokenised."""
    from training.deepspeed import check_config

    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"(?s){part}") as error:
        check_config(str(path), 32, 1.0, torch.device("cpu"))
    assert "ds.json" in str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_the_shipped_configs_are_accepted(stage):
    from training.deepspeed import check_config

    check_config(str(ROOT / "configs" / f"zero{stage}.json"), 32, 1.0, torch.device("cpu"))
