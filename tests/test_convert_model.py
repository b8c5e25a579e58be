"""scripts/convert_model.py from the outside: there and back, what it says, what it refuses; nothing is left behind."""

import json
import os
import resource
import signal
import stat

import pytest
import torch
from test_kill import in_a_fork
from tiny_model import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import conversion
from model.layouts import LAYOUTS, from_ours
from model.LMConfig import config_fields
from model.loading import load_tokenizer, save_weights
from model.model import MiniMindForCausalLM
from model.model_lora import apply_lora, lora_state_dict
from model.record import fingerprint, read_record, write_record
from scripts import convert_model
from scripts.convert_model import main

SIZES = {"n_heads": 8, "vocab_size": 6400, "dim": 64, "n_layers": 2, "hidden_dim": 96, "max_seq_len": 256}
V3 = {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6}
KINDS = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": V3,
    "Ernie4_5_MoeForCausalLM": {"use_moe": True},
    "Qwen3MoeForCausalLM": {**V3, "use_moe": True, "n_shared_experts": False, "num_experts_per_tok": 1},
}


def random_model(**fields) -> MiniMindForCausalLM:
    return make_model(**{**SIZES, **fields})


@pytest.fixture(params=KINDS)
def case(request, tmp_path):
    """A .pth file with its record: (architecture of transformers, the model, the file)."""
    model = random_model(**KINDS[request.param])
    path = tmp_path / "full_sft_64.pth"
    save_weights(model.state_dict(), path)
    write_record(path, model.config)
    return request.param, model, path


def test_there_and_back_loses_nothing(case, tmp_path, capsys):
    architecture, model, path = case
    main([str(path), str(tmp_path / "folder")])
    assert f"folder: {architecture}, its logits are " in capsys.readouterr().out
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architectures"] == [architecture]
    main([str(tmp_path / "folder"), str(tmp_path / "back.pth")])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    record, _ = read_record(tmp_path / "back.pth")
    assert record["started_from"] == {
        "weights": (tmp_path / "folder").as_posix(),
        "fingerprint": fingerprint(tmp_path / "folder"),
    }
    main([str(path), str(tmp_path / "copy.pth")])
    assert read_record(tmp_path / "copy.pth")[0]["started_from"]["fingerprint"] == fingerprint(path)
    fields = config_fields(record["config"])
    ours = config_fields(model.config)
    training = {"aux_loss_alpha", "seq_aux"}  # no other architecture has them
    assert {k: v for k, v in fields.items() if k not in training} == {
        k: v for k, v in ours.items() if k not in training
    }


def test_transformers_answers_the_same_without_our_code(case, tmp_path):
    _, model, path = case
    main([str(path), str(tmp_path / "folder")])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    messages = [{"role": "user", "content": "你好 hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert ids.tolist() == load_tokenizer().apply_chat_template(
        [messages], add_generation_prompt=True, return_dict=False
    )
    greedy = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(other.generate(ids, **greedy), model.generate(ids, **greedy))


def test_what_transformers_4_reads_has_the_names_it_had_there(case, tmp_path):
    """Its tokenizer was of a class that only 5 has, and Qwen3Moe had 128 experts."""
    architecture, model, path = case
    main([str(path), str(tmp_path / "folder")])
    config, tokenizer = (
        json.loads((tmp_path / "folder" / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert config["rope_theta"] == model.config.rope_theta and config["torch_dtype"] == "float32"
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "is_local" not in tokenizer
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]  # generate() refused token_type_ids
    assert config.get("num_experts") == (4 if architecture == "Qwen3MoeForCausalLM" else None)


def test_every_file_has_the_mode_that_the_umask_says(tmp_path):
    """safetensors gives its files mode 0600: no other user could read them, such as vLLM's in a container."""
    model = random_model()
    save_weights(model.state_dict(), tmp_path / "m_64.pth")
    apply_lora(model, rank=2)
    save_weights(lora_state_dict(model), tmp_path / "a_64.pth")
    usual = os.umask(0o027)
    try:
        main([str(tmp_path / "m_64.pth"), str(tmp_path / "folder")])
        main([str(tmp_path / "a_64.pth"), str(tmp_path / "peft")])
    finally:
        os.umask(usual)
    written = [*(tmp_path / "folder").iterdir(), *(tmp_path / "peft").iterdir()]
    assert {path.name for path in written} >= {"model.safetensors", "adapter_model.safetensors"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}


@pytest.mark.parametrize("stored", ["f16", "q8_0"])
def test_a_gguf_file_and_its_modelfile(case, tmp_path, capsys, stored):
    _, _, path = case
    main([str(path), str(tmp_path / "x" / "m.gguf"), "--dtype", stored])
    assert f"m.gguf: {stored}: every number is as {stored} rounds it" in capsys.readouterr().out
    assert (tmp_path / "x" / "m.Modelfile").read_text(encoding="utf-8").startswith("FROM ./m.gguf\n")


def test_other_architectures_on_request(tmp_path, capsys):
    model = random_model(use_moe=True)
    save_weights(model.state_dict(), tmp_path / "m_64_moe.pth")
    for architecture in ("granitemoeshared", "qwen2_moe"):
        main([str(tmp_path / "m_64_moe.pth"), str(tmp_path / architecture), "--architecture", architecture])
    assert "assumed: n_heads 8" in capsys.readouterr().out


def test_half_precision_is_compared_with_the_rounded_model(tmp_path, capsys):
    model = random_model()
    save_weights(model.state_dict(), tmp_path / "m_64.pth")
    main([str(tmp_path / "m_64.pth"), str(tmp_path / "half"), "--dtype", "bf16"])
    assert "from those in float32" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16


def test_minimind_of_2024_needs_no_flags(tmp_path, capsys):
    model = random_model(n_heads=16, n_kv_heads=8, rope_theta=1e4, max_seq_len=512)
    torch.save(from_ours(model.state_dict(), LAYOUTS["2025-02"], model.config.head_dim), tmp_path / "full_sft_64.pth")
    main([str(tmp_path / "full_sft_64.pth"), str(tmp_path / "folder")])
    assert "layout 2025-02" in capsys.readouterr().out
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["missing.pth", "x"], "missing.pth not found: check the path; . holds adapter.pth, damaged.pth, double.pth"),
        (["missing", "x.pth"], "missing not found: check the path; . holds adapter.pth"),
        (["out/full_sft_512.pth", "x"], "full_sft_512.pth not found: check the path; out/quick holds full_sft_64.pth"),
        (["m_64.pth", "x.safetensors"], "x.safetensors: weights for transformers come in a folder: name one, x"),
        (["m_64.pth", "taken"], "taken exists"),
        (["m_64.pth", "m_64.pth"], "m_64.pth exists"),
        (["m_64.pth", "taken.gguf"], "taken.gguf exists"),
        (["m_64.pth", "x", "--architecture", "qwen3"], "qk_norm is False"),
        (["m_64.pth", "x", "--dim", "128"], "--dim 128 contradicts dim 64"),
        (["m_64.pth", "x", "--dtype", "q8_0"], "a folder holds one of"),
        (["m_64.pth", "x.pth", "--dtype", "f16"], "holds float32"),
        (["m_64.pth", "x.gguf", "--architecture", "llama"], "leave it out"),
        (["m_64.pth", "taken.pth"], "taken.json exists"),  # the place of its record
        (["m_64.pth", "link.pth"], "link.pth exists"),
        (["m_64.pth", "link"], "link exists"),
        (["m_64.pth", "m_64.old", "--to", "pth"], "m_64.old: the name must end in .pth"),  # its record is m_64.json
        (["m_64.pth", "x.Modelfile", "--to", "gguf"], "the name must end in .gguf"),
        (
            ["large.pth", "x", "--dtype", "f16"],
            "f16 ends at 65504, and these weights go up to 100000: pass --",
        ),
        (["large.pth", "x.gguf"], "f16 ends at 65504, and these weights go up to 100000: pass --"),
        (["double.pth", "x"], "double.pth holds NaN or infinity"),
        (["eighths.pth", "x"], "is float8_e4m3fn"),
        (["damaged.pth", "x"], "damaged.pth is cut off or damaged"),
        (["folder", "x.pth"], "attention_bias is True"),
        (["taken.gguf", "x"], "taken.gguf is no GGUF file"),
        (["adapter.pth", "x.onnx"], "adapter.pth is a LoRA adapter: name the weights it was trained on as SRC"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, reason):
    model = random_model()
    monkeypatch.chdir(tmp_path)
    save_weights(model.state_dict(), tmp_path / "m_64.pth")
    write_record(tmp_path / "m_64.pth", model.config)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "taken.gguf").write_text("mine")
    (tmp_path / "taken.json").write_text("mine")
    (tmp_path / "out" / "quick").mkdir(parents=True)
    (tmp_path / "out" / "quick" / "full_sft_64.pth").write_bytes(b"")
    for name in ("link", "link.pth"):
        (tmp_path / name).symlink_to("nowhere")
    others = {
        "large": torch.full((64,), 1e5),
        "double": torch.full((64,), 1e300, dtype=torch.float64),
        "eighths": torch.ones(64).to(torch.float8_e4m3fn),
    }
    for name, norm in others.items():
        torch.save({**model.state_dict(), "model.norm.weight": norm}, tmp_path / f"{name}.pth")
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "m_64.pth").read_bytes()[:5000])
    save_weights({"model.layers.0.self_attn.q_proj.lora.A.weight": torch.zeros(2, 64)}, tmp_path / "adapter.pth")
    main(["m_64.pth", "folder"])
    fields = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**fields, "attention_bias": True}))
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and reason in capsys.readouterr().err
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("target", ["x", "x.pth", "x.gguf", "x.onnx"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, capsys, target):
    model = random_model()
    save_weights(model.state_dict(), tmp_path / "m_64.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            main([str(tmp_path / "m_64.pth"), str(tmp_path / target)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert exit.value.code == 2 and "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m_64.pth"]


def test_a_missing_package_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_model, "is_installed", lambda package: False)
    with pytest.raises(SystemExit):
        main(["m_64.pth", str(tmp_path / "x.gguf")])
    assert "pip install gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "moment"),
    [
        ("x", "write_folder"),
        ("x", "compare"),
        ("x.pth", "write_record"),
        ("x.gguf", "write_gguf"),
        ("x.gguf", "compare"),
        ("x.onnx", "onnx_logits"),
    ],
)
def test_a_killed_conversion_leaves_no_half_and_the_next_one_tidies_up(tmp_path, monkeypatch, target, moment):
    model = random_model()
    save_weights(model.state_dict(), tmp_path / "m_64.pth")
    write_record(tmp_path / "m_64.pth", model.config)
    arguments = [str(tmp_path / "m_64.pth"), str(tmp_path / target)]

    def convert_until_killed() -> None:
        monkeypatch.setattr(conversion, moment, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        main(arguments)

    assert os.WTERMSIG(in_a_fork(convert_until_killed)) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")].count(target) == 0
    main(arguments)
    assert (tmp_path / target).exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
