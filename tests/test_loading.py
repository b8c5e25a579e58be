"""Weight files: round trip, atomic writing, and errors that say what to do."""

import io
import os
import pickle
import shutil
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from toy import damaged_copies, same_weights

from model.LMConfig import PUBLISHED, LMConfig
from model.loading import (
    TOKENIZER_DIR,
    load_tokenizer,
    save_weights,
    training_command,
    weights_path,
)
from model.model import MiniMindForCausalLM
from model.opening import load_model, load_weights

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97}


def make_model(**changes) -> MiniMindForCausalLM:
    return MiniMindForCausalLM(LMConfig(**{**TINY, **changes})).eval()


def test_names():
    assert str(weights_path("out", "full_sft", LMConfig())) == "out/full_sft_512.pth"
    assert str(weights_path("out", "pretrain", LMConfig(dim=640, use_moe=True))) == "out/pretrain_640_moe.pth"


@pytest.mark.parametrize("use_moe", [False, True])
def test_round_trip(tmp_path, use_moe):
    model = make_model(use_moe=use_moe)
    path = tmp_path / "new" / "pretrain_32.pth"
    save_weights(model.state_dict(), path)
    loaded = load_model(model.config, path)
    assert not loaded.training
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert os.listdir(path.parent) == [path.name]  # no temporary file left


def test_file_holds_both_names_of_the_tied_matrix_once_in_float32(tmp_path):
    model = make_model()
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    whole = model.state_dict()
    whole["model.norm.weight"] = flat[-32:]  # a view into a large buffer must not drag the buffer along
    save_weights({name: tensor.bfloat16() for name, tensor in whole.items()}, tmp_path / "half.pth")
    save_weights(whole, tmp_path / "full.pth")
    state = torch.load(tmp_path / "full.pth", weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert os.path.getsize(tmp_path / "full.pth") < size + 20_000
    half = torch.load(tmp_path / "half.pth", weights_only=True)
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    load_weights(model, tmp_path / "half.pth")


def test_half_precision_files_load(tmp_path):
    model = make_model()
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, tmp_path / "x.pth")
    assert next(load_model(model.config, tmp_path / "x.pth").parameters()).dtype == torch.float32


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="counts the threads of this process as Linux shows them"
)
def test_saving_beside_a_run_starts_no_compute_threads(tmp_path):
    """They would fight with the run's own for the cores: every later step took 1.4 times as long."""
    counts, threads = [], torch.get_num_threads()
    weights = {"weight": torch.zeros(1_000_000)}

    def save():
        counts.append(len(os.listdir("/proc/self/task")))
        save_weights(weights, tmp_path / "x.pth")
        counts.append(len(os.listdir("/proc/self/task")))

    torch.set_num_threads(2)
    try:
        writer = threading.Thread(target=save)
        writer.start()
        writer.join()
    finally:
        torch.set_num_threads(threads)
    assert counts[0] == counts[1]


def test_a_full_disk_is_called_so(tmp_path):
    """torch.save says "enforce fail at inline_container.cc: unexpected pos 2624 vs 2518"."""

    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    with patch.object(Path, "open", lambda path, mode: FullDisk(path, mode)):
        with pytest.raises(OSError, match="No space left on device"):
            save_weights({"a": torch.zeros(1000)}, tmp_path / "x.pth")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model, path = make_model(), tmp_path / "x.pth"
    save_weights(model.state_dict(), path)
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(make_model().state_dict(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("pretrain_32.pth", "python train_pretrain.py --dim 32 --n_layers 2"),
        ("full_sft_32.pth", "python train_full_sft.py --dim 32"),
        ("rlhf_32.pth", "python train_dpo.py --dim 32"),
        ("reason_32.pth", "python train_distill_reason.py --dim 32"),
    ],
)
def test_missing_file_names_the_command_that_makes_it(tmp_path, name, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name} not found: run `{command} --out_dir {tmp_path}` first"):
        load_weights(make_model(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"{name} not found: run `{command}` first"):
        load_weights(make_model(), Path("out") / name)  # the default directory needs no flag


@pytest.mark.parametrize("folder", ["", "quickstart"])
def test_missing_file_names_those_of_other_sizes_that_are_there(tmp_path, folder):
    """After `make quickstart`, `python train_dpo.py` asked for a model of the default size and its data, 1.6 GB."""
    save_weights(make_model().state_dict(), tmp_path / folder / "full_sft_32.pth")
    save_weights(make_model(use_moe=True).state_dict(), tmp_path / folder / "full_sft_32_moe.pth")
    (tmp_path / folder / "full_sft_99.pth").write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError) as error:
        load_weights(make_model(dim=64), tmp_path / "full_sft_64.pth")
    where = tmp_path / folder
    assert f"{where} holds full_sft_32.pth: pass --dim 32 --out_dir {where}\n" in str(error.value)
    assert f"pass --dim 32 --use_moe --out_dir {where}" in str(error.value)
    assert f"or run `python train_full_sft.py --dim 64 --out_dir {tmp_path}`" in str(error.value)
    with pytest.raises(FileNotFoundError) as error:
        load_weights(make_model(dim=64, use_moe=True), tmp_path / "full_sft_64_moe.pth")
    assert f"pass --dim 32 --use_moe False --out_dir {where}\n" in str(error.value)  # --use_moe was given


def test_a_missing_file_of_no_stage_names_those_that_are_there(tmp_path):
    for name in ("untaught_32", "rlhf_32"):
        save_weights(make_model().state_dict(), tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match=r"untuaght_32.pth not found: .* holds rlhf_32.pth, untaught_32.pth$"):
        load_weights(make_model(), tmp_path / "untuaght_32.pth")


def test_the_remedy_for_a_published_model_names_it():
    """--dim 768 alone makes another model than minimind-3, which --model minimind-3 then contradicts."""
    words = ["train_pretrain.py"]
    for name in ("minimind-3", "minimind-3-moe", "minimind-v1-small"):
        assert training_command(words, LMConfig(**PUBLISHED[name]), Path("out")).endswith(f".py --model {name}")
    assert training_command(words, LMConfig(**PUBLISHED["MiniMind2"]), Path("out")).endswith("--dim 768 --n_layers 16")


def test_missing_moe_file_and_explicit_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python train_full_sft.py --dim 32 --use_moe True"):
        load_weights(make_model(use_moe=True), tmp_path / "full_sft_32_moe.pth")
    with pytest.raises(FileNotFoundError, match="run `make quickstart` first"):
        load_weights(make_model(), tmp_path / "x.pth", make_with="make quickstart")


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"n_layers": 3}, "pass --n_layers 2"),
        ({"dim": 64}, "pass --dim 32"),
        ({"use_moe": True}, "pass --use_moe False"),
        ({"dim": 64, "n_layers": 3}, "pass --dim 32 --n_layers 2"),
    ],
)
def test_wrong_size_names_the_flags(tmp_path, changes, flags):
    save_weights(make_model().state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=flags + "$"):
        load_model(LMConfig(**{**TINY, **changes}), tmp_path / "x.pth")


def test_other_differences_name_the_tensors(tmp_path):
    save_weights(make_model().state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"k_proj.weight is \(16, 32\), not \(8, 32\).*n_kv_heads"):
        load_model(LMConfig(**{**TINY, "n_kv_heads": 1}), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="q_norm.weight missing"):
        load_model(LMConfig(**TINY, qk_norm=True), tmp_path / "x.pth")
    save_weights({"transformer.wte.weight": torch.zeros(97, 32)}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match="no layout of MiniMind: its names begin with transformer.wte.weight"):
        load_model(LMConfig(**TINY), tmp_path / "y.pth")


def test_a_wrong_file_leaves_the_model_unchanged(tmp_path):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = make_model().state_dict()
    del state["model.norm.weight"]
    save_weights(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="model.norm.weight missing"):
        load_weights(model, tmp_path / "x.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_untied_head_is_refused(tmp_path):
    state = dict(make_model().state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_weights(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="one matrix for both"):
        load_weights(make_model(), tmp_path / "x.pth")


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "pretrain_32.pth"
    save_weights(make_model().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match="pretrain_32.pth is .*damaged.*python train_pretrain.py"):
        load_weights(make_model(), path)


def test_damage_anywhere_is_found_or_harmless(tmp_path):
    """torch.load looks at no checksum: of such files nearly half loaded, with changed weights."""
    path, model = tmp_path / "x.pth", make_model()
    save_weights(model.state_dict(), path)
    refused = 0
    for copy in damaged_copies(path.read_bytes(), 150):
        path.write_bytes(copy)
        loaded = make_model()
        try:
            load_weights(loaded, path)
        except ValueError as error:
            refused += 1
            assert "x.pth is " in str(error) and "damaged" in str(error)
        else:
            assert same_weights(loaded.state_dict(), model.state_dict())
    assert refused > 100


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    state = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    state["model.norm.weight"][0] = float("inf")
    state["model.embed_tokens.weight"][7, 7] = float("nan")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.mlp.up_proj.weight"].fill_(3e38)  # its sum overflows, and is no proof
    save_weights(state, tmp_path / "pretrain_32.pth")
    message = "holds NaN or infinity in 4 tensors, first model.embed_tokens.weight.*run `python train_pretrain"
    with pytest.raises(ValueError, match=message):
        load_weights(make_model(), tmp_path / "pretrain_32.pth")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (torch.Tensor.to_sparse, "holds sparse tensors, first model"),
        (lambda tensor: tensor.to("meta"), r"holds empty .meta. tensors, first model"),
        (lambda tensor: tensor.to(torch.int8), "no floating-point weights .model.embed_tokens.weight is int8"),
        (
            lambda tensor: tensor.to(torch.complex64),
            "no floating-point weights .model.embed_tokens.weight is complex64",
        ),
    ],
)
def test_tensors_of_other_kinds_are_refused(tmp_path, change, problem):
    """The first two ended with a stack trace, the others were rounded in silence."""
    state = {name: change(tensor.detach()) for name, tensor in make_model().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=problem):
        load_weights(make_model(), tmp_path / "x.pth")


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(os.urandom(1000))
    with pytest.raises(ValueError, match="not a PyTorch file"):
        load_weights(make_model(), path)
    torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match="not a state dict"):
        load_weights(make_model(), path)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_does_not_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"weight": Payload(trap)}, tmp_path / "x.pth", pickle_module=pickle)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_weights(make_model(), tmp_path / "x.pth")
    assert not trap.exists()


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="scripts/train_tokenizer.py"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_damaged_tokenizer(tmp_path, name, content):
    shutil.copytree(TOKENIZER_DIR, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="is damaged: copy it again"):
        load_tokenizer(tmp_path)
