"""scripts/convert_model.py with LoRA adapters: merged, and to peft and back, on ours and on the native exports."""

import json
import os
import resource
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_convert_model import random_model
from test_kill import in_a_fork
from transformers import AutoModelForCausalLM

from model import adapter_conversion
from model.adapters import read_lora
from model.loading import save_weights
from model.model_lora import apply_lora, load_lora, lora_state_dict
from model.opening import load_model
from model.record import describe_file, read_record, write_record
from scripts.convert_model import main

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KINDS = {
    "llama": {},
    "qwen3": {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6},
    "ernie4_5_moe": {"use_moe": True},
}
IDS = torch.arange(5, 45)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def randomise(parameters) -> None:
    torch.manual_seed(5)
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)


@pytest.fixture(params=KINDS)
def case(request, tmp_path):
    """(architecture, weights, adapter, the logits of both): files with their records."""
    model = random_model(**KINDS[request.param])
    base, adapter = tmp_path / "base_64.pth", tmp_path / "lora" / "a_64.pth"
    save_weights(model.state_dict(), base)
    write_record(base, model.config)
    apply_lora(model, rank=4, alpha=8.0, **({"targets": ATTENTION} if model.config.use_moe else {}))
    randomise(model.parameters())
    save_weights(lora_state_dict(model), adapter)
    write_record(adapter, model.config, stage="lora", started_from=describe_file(base))
    return request.param, base, adapter, logits(model)


def test_merged_weights_answer_like_base_and_adapter(case, tmp_path, capsys):
    _, base, adapter, expected = case
    merged = tmp_path / "merged_64.pth"
    main([str(base), str(merged), "--lora", str(adapter)])
    told = capsys.readouterr().out
    assert f"{adapter}: merged, " in told and "trained on other weights" not in told
    record, _ = read_record(merged)
    assert relative(logits(load_model(record["config"], merged)), expected) < 1e-5
    assert relative(logits(load_model(record["config"], base)), expected) > 0.01
    assert record["adapter"] == describe_file(adapter) and record["started_from"] == describe_file(base)
    main([str(merged), str(tmp_path / "twice_64.pth"), "--lora", str(adapter)])
    assert "was trained on other weights than" in capsys.readouterr().out


def test_peft_puts_our_adapter_on_the_native_export(case, tmp_path):
    """Ernie turns other pairs of channels: with rows of q and k in our order, peft's logits were 0.4 off."""
    architecture, base, adapter, expected = case
    main([str(base), str(tmp_path / "export")])
    main([str(adapter), str(tmp_path / "peft"), "--base_model", str(tmp_path / "export")])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert other.config.model_type == architecture
    assert relative(logits(PeftModel.from_pretrained(other, str(tmp_path / "peft"))), expected) < 1e-5
    main([str(tmp_path / "peft"), str(tmp_path / "back.pth")])
    config = read_record(adapter)[0]["config"]
    back, source = read_lora(tmp_path / "back.pth", config), read_lora(adapter, config)
    assert back.keys() == source.keys() and all(torch.equal(back[name], source[name]) for name in source)


@pytest.mark.parametrize("architecture", ["ernie4_5_moe", "granitemoeshared"])
def test_an_adapter_that_peft_trained_on_an_export_is_read(tmp_path, architecture):
    model = random_model(use_moe=True)
    save_weights(model.state_dict(), tmp_path / "base_64_moe.pth")
    write_record(tmp_path / "base_64_moe.pth", model.config)
    main([str(tmp_path / "base_64_moe.pth"), str(tmp_path / "export"), "--architecture", architecture])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=list(ATTENTION), task_type="CAUSAL_LM")
    theirs = get_peft_model(other, settings)
    randomise(theirs.parameters())
    theirs.save_pretrained(str(tmp_path / "peft"))
    main([str(tmp_path / "peft"), str(tmp_path / "ours.pth")])
    record, _ = read_record(tmp_path / "ours.pth")  # known, as its base is here
    load_lora(model, read_lora(tmp_path / "ours.pth", record["config"]))
    assert relative(logits(model), logits(theirs)) < 1e-5
    # Without its base here, --architecture and the number of heads say the same.
    (tmp_path / "export").rename(tmp_path / "elsewhere")
    flags = ["--architecture", architecture, "--n_heads", "8"]
    main([str(tmp_path / "peft"), str(tmp_path / "again.pth"), *flags])
    assert not (tmp_path / "again.json").exists()  # most of the model is not known
    again, ours = torch.load(tmp_path / "again.pth"), torch.load(tmp_path / "ours.pth")
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a.pth", "x.gguf"], "name the weights it was trained on as SRC"),
        (["a.pth", "x", "--lora", "a.pth"], "name the weights it was trained on as SRC"),
        (["a.pth", "taken"], "taken exists"),
        (["a.pth", "base.pth"], "base.pth exists"),
        (["base.pth", "x.pth", "--lora", "none.pth"], "none.pth not found"),
        (["base.pth", "x.pth", "--lora", "base.pth"], "is no LoRA file"),
        (["base.pth", "x.pth", "--lora", "wide.pth"], "wide.pth: the adapter does not fit"),
        (["foreign", "x.pth"], "trained on a gpt2, which is no MiniMind"),
        (["a.pth", "x", "--dim", "128"], "--dim 128 contradicts dim 64"),
        (["a.pth", "x", "--architecture", "qwen3"], "qk_norm is False"),
        (["experts.pth", "x"], "no adapters of routed experts"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    for name, sizes in {"a": {}, "wide": {"dim": 128}, "experts": {"use_moe": True}}.items():
        model = random_model(**sizes)
        if name == "a":
            save_weights(model.state_dict(), tmp_path / "base.pth")
        apply_lora(model, rank=2)
        save_weights(lora_state_dict(model), tmp_path / f"{name}.pth")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    main(["a.pth", "foreign"])
    settings = json.loads((tmp_path / "foreign" / "adapter_config.json").read_text())
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "foreign" / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": "gpt2"})
    )
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and reason in capsys.readouterr().err
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("target", ["peft", "x.pth"])
def test_a_full_disk_and_a_kill_leave_no_half(tmp_path, monkeypatch, capsys, target):
    model = random_model()
    apply_lora(model, rank=16)
    save_weights(lora_state_dict(model), tmp_path / "a.pth")
    write_record(tmp_path / "a.pth", model.config)
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = [str(tmp_path / "a.pth"), str(tmp_path / target)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert exit.value.code == 2 and "error: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before

    def convert_until_killed() -> None:
        monkeypatch.setattr(adapter_conversion, "_check_equal", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        main(arguments)

    assert os.WTERMSIG(in_a_fork(convert_until_killed)) == signal.SIGKILL
    assert not (tmp_path / target).exists()
    main(arguments)
    assert (tmp_path / target).exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
