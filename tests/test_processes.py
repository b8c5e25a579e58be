"""One process of a run: its beginning, its end, and that it needs no others."""

import pytest
import torch
from toy import toy_args, toy_model, toy_run

from common.device import choose_device
from training.processes import distributed_run, seed_everything

CPU = torch.device("cpu")


def test_a_missing_device_is_refused_with_a_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda:3: not available here; use --device auto"):
        choose_device("cuda:3")
    with pytest.raises(SystemExit), distributed_run(toy_args(tmp_path, "--device", "cuda")):
        pass
    assert "error: --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["abacus", "xla"])
def test_an_unknown_device_is_a_plain_error(name, tmp_path, capsys):
    with pytest.raises(SystemExit), distributed_run(toy_args(tmp_path, "--device", name)):
        pass
    assert "--device" in capsys.readouterr().err


def test_one_process_needs_no_collectives():
    run, tensor = toy_run(), torch.ones(2)
    run.barrier()
    run.broadcast(toy_model())
    assert run.sum_over_ranks(tensor) is tensor and run.from_main(5) == 5 and run.gather(5) == [5]
    with run.main_first():
        pass


def test_seeds_differ_between_ranks_and_repeat():
    draws = []
    for rank in (0, 1, 0):
        seed_everything(7, rank)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[2] != draws[1]


def test_ctrl_c_outside_of_training_is_one_line_and_no_trace(tmp_path, capsys):
    """While data is read, in DPO's reference pass, in LoRA's evaluations before and after."""
    with pytest.raises(SystemExit) as stopped, distributed_run(toy_args(tmp_path)):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and "nothing is lost" in capsys.readouterr().err


def test_threads_flag(tmp_path):
    before = torch.get_num_threads()
    with distributed_run(toy_args(tmp_path, "--threads", "1")):
        assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
