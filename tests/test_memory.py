"""Memory: estimated before it is taken, refused where it cannot fit, and bounded while a run on a CPU keeps it."""

import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy import toy_args, toy_model, toy_run, toy_sequences, toy_train

from common.device import cpu_has_fast_bfloat16
from common.memory import KERNELS, container_limits, keep_fewer_kernels, machine_memory
from model.LMConfig import LMConfig
from model.loading import count_parameters
from model.model import MiniMindForCausalLM
from training import memory
from training.inputs import starting_model, starting_tokenizer
from training.losses import next_token_loss
from training.memory import (
    LivePeak,
    live_peak,
    memory_report,
    most_activations,
    out_of_memory_advice,
    planned_parameters,
)
from training.report import fold

# Before a run


@pytest.mark.parametrize("flags", [("--dim", "65536", "--n_layers", "1000"), ("--dim", "8192", "--n_layers", "1000")])
def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(flags, tmp_path):
    args = toy_args(tmp_path, *flags)
    with pytest.raises(ValueError, match=f"--dim {args.dim} --n_layers 1000: .* takes .* lower --dim"):
        starting_model(args, starting_tokenizer(args))


def test_what_training_adds_counts_where_the_weights_alone_would_fit(tmp_path, monkeypatch):
    args = toy_args(tmp_path)
    monkeypatch.setattr(memory, "machine_memory", lambda: 10 * planned_parameters(args.config))
    starting_model(args, starting_tokenizer(args), is_trained=False)
    with pytest.raises(ValueError, match="AdamW"):
        starting_model(args, starting_tokenizer(args))


@pytest.mark.parametrize("use_moe", [False, True])
def test_parameters_are_counted_without_building_the_model(use_moe):
    config = LMConfig(dim=64, n_layers=5, use_moe=use_moe)
    assert planned_parameters(config) == count_parameters(MiniMindForCausalLM(config))


def test_a_run_larger_than_the_machine_is_refused_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    with pytest.raises(SystemExit):
        toy_train(tmp_path, "--batch_size", "30")
    error = capsys.readouterr().err
    assert "activations" in error and "this machine has 0 MB: lower --batch_size 30 to 15" in error
    assert not (tmp_path / "toy_16.pth").exists()


@pytest.mark.parametrize(
    ("line", "folder", "name"),
    [
        ("0::/a/b", "a", "memory.max"),
        ("0::/", "", "memory.max"),
        ("4:memory:/a/b", "memory/a", "memory.limit_in_bytes"),
        ("4:cpu,memory:/not/in/this/container", "memory", "memory.limit_in_bytes"),
    ],
)
def test_a_containers_limit_is_the_machines_memory(line, folder, name, tmp_path):
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / folder).mkdir(parents=True)
    groups.write_text(f"9:cpuset:/x\n{line}\n")
    assert container_limits(groups, root) == []
    (root / folder / name).write_text("max\n")
    assert container_limits(groups, root) == []
    (root / folder / name).write_text("123456\n")
    assert container_limits(groups, root) == [123456]
    assert machine_memory() is None or machine_memory() > 10**8


# The estimate


def test_the_estimate_is_what_a_full_micro_batch_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROBE", 64)
    run, args, model = toy_run(), toy_args(tmp_path), toy_model(dim=32, hidden_dim=64)
    sequences = toy_sequences(64)
    batch = sequences.collate(np.argsort(sequences.lengths)[-32:])
    before = torch.get_rng_state()
    estimate = most_activations(run, model, next_token_loss, sequences, batch["input_ids"].numel())
    assert estimate == pytest.approx(live_peak(run, model, next_token_loss, batch), rel=0.2)
    line, needed = memory_report(run, args, model, next_token_loss, sequences, batch["input_ids"].numel())
    assert line.startswith("memory: about ") and " + gradients 0 + " in line and needed > estimate
    assert torch.equal(before, torch.get_rng_state()), "the estimate must not change the run"
    assert all(p.grad is None for p in model.parameters())


def test_the_memory_line_is_the_sum_of_its_parts(tmp_path, monkeypatch):
    """The total comes first, and a run folds the line: with every part a name of its own it had 200 characters."""
    run, args, sequences = toy_run(), toy_args(tmp_path), toy_sequences(64)
    monkeypatch.setattr(memory, "machine_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(memory, "most_activations", lambda *_: 1.5e9)
    line, _ = memory_report(run, args, toy_model(), next_token_loss, sequences, 100)
    total, parts = re.fullmatch(r"memory: about ([\d,]+) MB of 8,000 MB = (.*)", line).groups()
    sizes = [int(part.rsplit(" ", 1)[1].replace(",", "")) for part in parts.split(" + ")]
    assert abs(int(total.replace(",", "")) - sum(sizes)) <= len(sizes) / 2, "each is rounded"
    assert "activations 1,500 + " in parts and "compiled kernels" not in parts  # of a float32 run
    assert len(line) > 120 and all(len(folded) <= 120 for folded in fold(line).splitlines())


def test_a_batch_is_not_taken_for_larger_than_the_data(tmp_path):
    run, model, sequences = toy_run(), toy_model(), toy_sequences(8)
    huge, all_of_it = (most_activations(run, model, next_token_loss, sequences, n) for n in (10**12, 200))
    assert huge < 10 * all_of_it


def test_live_peak_counts_what_is_alive_at_once():
    start = torch.zeros(1000)
    with LivePeak() as counter:
        a = start + 1  # 4,000 bytes
        a.add_(1)
        a.view(10, 100)
        b = a + a  # 8,000
        del a
        c = b + b  # 8,000 again
        del b, c
    assert counter.peak == 8000 and counter.live == 0


# While it runs


MANY_SHAPES = """
import sys
from training.processes import distributed_run
from common import memory
if sys.argv[1] == "few":
    memory.KERNELS = 4
    memory.keep_fewer_kernels()
import torch
weight = torch.zeros(64, 64, dtype=torch.bfloat16)
for rows in range(8, 1608, 8):
    torch.zeros(rows, 64, dtype=torch.bfloat16) @ weight
memory.give_back_free_memory()
print(memory.heap_memory())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not cpu_has_fast_bfloat16(),
    reason="only there a matrix product in bfloat16 is known to be compiled for each shape",
)
def test_matrix_products_of_many_shapes_are_not_all_kept():
    """Nothing that is imported may have made oneDNN read its limit before it is set."""
    ours = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    few, all_of_them = (
        int(
            subprocess.run(
                [sys.executable, "-c", MANY_SHAPES, how], env=environment, capture_output=True, check=True
            ).stdout
        )
        for how in ("few", "all")
    )
    assert few < all_of_them - 50e6


def test_what_the_user_says_about_kernels_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    keep_fewer_kernels()
    assert os.environ == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KERNELS)}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_flags_to_lower(error, tmp_path):
    args = toy_args(tmp_path, "--batch_size", "32", "--accumulation_steps", "4")
    with pytest.raises(SystemExit) as stopped, out_of_memory_advice(args):
        raise error
    assert "--batch_size 32 to 16" in stopped.value.code and "--accumulation_steps 4 to 8" in stopped.value.code
    assert "Whatever was saved before is whole" in stopped.value.code  # nothing may have been


def test_other_errors_are_not_mistaken_for_memory(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_advice(toy_args(tmp_path)):
        raise RuntimeError("shapes do not match")
