"""A stage that does not fit train() writes its own loop from the same parts, as reinforcement learning will.

Here with a made-up source of batches, which has no epochs and no plan but random numbers of its own, and a made-up
optimizer. Killed in the middle, it resumes bit for bit through the same saver.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_kill import in_a_fork
from toy import same_weights, toy_args, toy_model, toy_run, toy_sequences

from training.checkpoint import CheckpointError, Progress, list_states
from training.curves import read_log
from training.guard import WeightGuard
from training.loop import add_gradients
from training.losses import next_token_loss
from training.report import Meter, Report
from training.saver import Saver
from training.source import Place
from training.stats import StepStats
from training.updater import Updater
from training.watch import Watch

STEPS = 30


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2: the sign of two momenta; only one is kept."""

    def __init__(self, parameters, lr: float = 1e-3):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_(group["lr"] * (0.9 * momentum + 0.1 * parameter.grad).sign())
                momentum.mul_(0.99).add_(parameter.grad, alpha=0.01)


class Drawn:
    """Two micro-batches a step, of sequences drawn at random, and a temperature that falls: no plan, no end."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(7)
        self.temperature = 1.0

    def __iter__(self) -> Iterator[list[dict]]:
        sequences = toy_sequences()
        while True:
            ids = torch.randint(len(sequences), (2, 3), generator=self.generator).numpy()
            self.temperature *= 0.9
            yield [{**sequences.collate(row), "temperature": torch.tensor(self.temperature)} for row in ids]

    def state(self) -> dict:
        return {"random": self.generator.get_state(), "temperature": self.temperature}

    def load_state(self, state: dict) -> None:
        self.generator.set_state(state["random"])
        self.temperature = state["temperature"]


def cooled_loss(model, batch):
    loss, weight, metrics = next_token_loss(model, batch)
    return loss * batch["temperature"], weight, {**metrics, "temperature": batch["temperature"] * weight}


def own_loop(out: Path, *flags: str, killed_in: int = 0, optimizer=Lion) -> dict:
    """Train for STEPS steps; returns the weights. The process kills itself in the middle of step ``killed_in``."""
    run, args, model = toy_run(), toy_args(out, *flags), toy_model(dropout=0.1)
    torch.manual_seed(args.seed)
    updater, source, progress = Updater(run, model, optimizer(model.parameters()), scale=0.01), Drawn(), Progress()
    guard = WeightGuard(run, model, toy_sequences())
    saver = Saver(run, args, model.config, updater, source, progress, guard, data_fingerprint="drawn")
    saver.resume()
    report = Report(run, args, saver.run_name, STEPS, progress.step)
    meter, stats = Meter(), StepStats(run)
    watch = Watch(meter, progress, report)

    for micro_batches in source:
        stats.begin()
        add_gradients(run, updater, cooled_loss, meter.timed(micro_batches), stats)
        if progress.step + 1 == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        stats.wish(stop=bool(run.stop_signal), save=saver.is_time())
        updater.step(stats, lr=1e-3)
        watch.put(stats.fetch())
        progress.step += 1
        if progress.step % 5 == 0:
            watch.read()
            report.log_step(progress, Place(1, 1, progress.step, STEPS), 1e-3, meter)
            saver.save(final=True)  # waits for the disk, so that the test knows what is saved when it kills
        if progress.step == STEPS:
            break
    report.close()
    saver.close()
    return model.state_dict()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr("training.report.plot_log", lambda path: None)


def test_a_killed_run_of_other_parts_resumes_exactly(tmp_path):
    straight = own_loop(tmp_path / "straight")
    for moment in (4, 13, 27):  # before the first save, and with two states on disk
        assert in_a_fork(lambda at=moment: own_loop(tmp_path / "killed", "--resume", "auto", killed_in=at)) == 9
    resumed = own_loop(tmp_path / "killed", "--resume")
    assert same_weights(resumed, straight)
    assert same_weights(torch.load(tmp_path / "killed" / "toy_16.pth", weights_only=True), straight)


def test_it_learns_and_is_logged_with_its_own_figures(tmp_path):
    own_loop(tmp_path)
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    records = [record for record in read_log(log) if "loss" in record]
    assert [record["step"] for record in records] == [5, 10, 15, 20, 25, 30]
    assert records[-1]["nll"] < records[0]["nll"] and records[-1]["temperature"] == pytest.approx(0.9**28, rel=0.05)
    assert records[-1]["tokens"] > records[0]["tokens"]


def test_another_optimizer_does_not_continue_it(tmp_path, capsys):
    own_loop(tmp_path)
    with pytest.raises(CheckpointError, match="no state to continue from"):
        own_loop(tmp_path, "--resume", optimizer=torch.optim.SGD)
    assert "its optimizer is 'Lion'" in capsys.readouterr().out
    assert len(list_states(tmp_path / "checkpoints" / "toy_16")) == 2
