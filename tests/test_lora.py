"""LoRA: the formula, merging and switching, MiniMind's files, and the stage; peft is in test_lora_peft.py."""

import shlex
import subprocess
import sys

import pytest
import torch
from toy import damaged_copies, same_weights
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import eval_model
import train_lora
from model.adapters import lora_path, read_lora
from model.LMConfig import LMConfig
from model.loading import REPO_ROOT, count_parameters, save_weights, weights_path
from model.model import MiniMindForCausalLM
from model.model_lora import adaptable_weights, apply_lora, load_lora, lora_state_dict, merge_lora, remove_lora

IDS = torch.arange(24).view(2, 12) % 17
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def small_model(use_moe: bool = False, dim: int = 32) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    config = LMConfig(dim=dim, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32, use_moe=use_moe)
    return MiniMindForCausalLM(config).eval()


def train_adapter(model, seed: int = 0) -> None:
    """Give the adapter in `model` values as training might."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def random_adapter(seed: int, use_moe: bool = False, **options) -> dict[str, torch.Tensor]:
    model = small_model(use_moe)
    apply_lora(model, **options)
    train_adapter(model, seed)
    return lora_state_dict(model)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("use_moe", [False, True])
def test_an_untrained_adapter_changes_nothing_and_only_it_is_trained(use_moe):
    model = small_model(use_moe)
    before = logits(model)
    apply_lora(model, rank=3)
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.state_dict() if ".lora." in name}
    model(IDS, labels=IDS).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize("use_moe", [False, True])
def test_default_targets_are_all_matrices_of_attention_and_feed_forward(use_moe):
    """Upstream L1 adapts square matrices only, which are the queries' and the outputs'."""
    model = small_model(use_moe)
    matrices = {
        name for name, p in model.named_parameters() if "layers" in name and p.ndim > 1 and "gate.w" not in name
    }
    assert {name.removesuffix(".weight") for name in matrices} == set(adaptable_weights(model))
    apply_lora(model)
    assert {name.partition(".lora.")[0] for name in lora_state_dict(model)} == set(adaptable_weights(model))
    apply_lora(model, targets=("q_proj", "o_proj"))
    names = {name.partition(".self_attn.")[2] for name in lora_state_dict(model)}
    assert names == {f"{target}.lora.{side}.weight" for target in ("q_proj", "o_proj") for side in "AB"}


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(1, None), (4, 8.0), (16, 3.0)])
def test_forward_is_that_of_the_weights_plus_scaled_product(use_moe, rank, alpha):
    """Equation 3: the same as full weights W + alpha / rank * B A, here computed expert by expert."""
    model, plain = small_model(use_moe), small_model(use_moe)
    base = logits(model)
    apply_lora(model, rank, alpha)
    train_adapter(model)
    raw = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for target, weight in adaptable_weights(plain).items():
        inner = target.replace("experts.", "experts.lora.") if weight.ndim == 3 else f"{target}.lora"
        A, B = raw[f"{inner}.A"], raw[f"{inner}.B"]
        pairs = zip(B, A, strict=True) if weight.ndim == 3 else [(B, A)]
        update = torch.stack([b @ a for b, a in pairs]).view_as(weight)
        weight.data += update * ((rank if alpha is None else alpha) / rank)
    assert (logits(model) - base).abs().max() > 0.01
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_moe", [False, True])
def test_merge_keeps_the_answers_and_leaves_a_plain_model(use_moe):
    model = small_model(use_moe)
    names = set(model.state_dict())
    apply_lora(model, rank=4, alpha=8)
    train_adapter(model)
    adapted = logits(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names
    small_model(use_moe).load_state_dict(model.state_dict())


@pytest.mark.parametrize("use_moe", [False, True])
def test_adapters_can_be_switched_and_taken_out(use_moe):
    adapters = [random_adapter(1, use_moe, rank=2), random_adapter(2, use_moe, rank=5, targets=("q_proj", "up_proj"))]
    alone = []
    for adapter in adapters:
        model = small_model(use_moe)
        load_lora(model, adapter)
        alone.append(logits(model))
    model = small_model(use_moe)
    base = logits(model)
    for i in (0, 1, 0, None, 1, None):
        if i is None:
            remove_lora(model)
        else:
            load_lora(model, adapters[i])
        assert torch.equal(logits(model), base if i is None else alone[i])


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_file_alone_restores_the_adapter(use_moe, tmp_path):
    """Rank and targets are its shapes and names, alpha is multiplied in: upstream's y = Wx + B(Ax) reads it right."""
    model = small_model(use_moe)
    apply_lora(model, rank=4, alpha=20.0, targets=("k_proj", "down_proj"))
    train_adapter(model)
    save_weights(lora_state_dict(model), tmp_path / "a.pth")
    adapter = torch.load(tmp_path / "a.pth", weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    other = small_model(use_moe)
    load_lora(other, read_lora(tmp_path / "a.pth", other.config))
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_base_in_low_precision_changes_nothing_under_autocast(use_moe):
    """Autocast rounds a float32 weight to bfloat16 at every use; rounding it once gives the same bits."""
    results = []
    for base_dtype in (None, torch.bfloat16):
        model = small_model(use_moe)
        apply_lora(model, rank=8, base_dtype=base_dtype)
        train_adapter(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(IDS, labels=IDS)
        output.loss.backward()
        results += [[output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]]
        assert logits(model).dtype == torch.float32, "sample answers are made without autocast"
    assert len(results[0]) > 10 and all(map(torch.equal, *results))


def test_dropout_is_active_in_training_only():
    model = small_model()
    apply_lora(model, rank=4, dropout=0.5)
    train_adapter(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


# MiniMind's files


def test_files_of_early_2025_are_converted_exactly(tmp_path):
    """Attention scores of the old layout, complex rotary pairs, equal Llama's after the conversion."""
    model = small_model()
    config, dim, head_dim = model.config, 32, 8
    torch.manual_seed(1)
    adapter = {}
    for name, out in (("wq", 32), ("wk", 16), ("wo", 32)):
        adapter[f"layers.1.attention.{name}.lora.A.weight"] = torch.randn(16, dim)
        adapter[f"layers.1.attention.{name}.lora.B.weight"] = torch.randn(out, 16)
    torch.save(adapter, tmp_path / "old.pth")
    converted = read_lora(tmp_path / "old.pth", config)
    load_lora(model, converted)  # the names and shapes fit
    x, T = torch.randn(6, dim), 6

    def product(files, name):
        return x @ files[f"{name}.lora.A.weight"].T @ files[f"{name}.lora.B.weight"].T

    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)  # (T, C/2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def old(name):  # (T, heads, C/2) complex
        return (
            torch.view_as_complex(product(adapter, f"layers.1.attention.{name}").view(T, -1, head_dim // 2, 2)) * turn
        )

    def new(name):  # (1, heads, T, C)
        return product(converted, f"model.layers.1.self_attn.{name}").view(1, T, -1, head_dim).transpose(1, 2)

    cos, sin = (torch.cat([f(angles)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    q, k = apply_rotary_pos_emb(new("q_proj"), new("k_proj"), cos, sin)
    scores = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2))[0]
    q, k = old("wq"), old("wk").repeat_interleave(2, dim=1)
    expected = torch.einsum("qhc,khc->hqk", q, k.conj()).real
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)
    for side in "AB":  # what no rotary embedding touches stays as it is
        key = f"o_proj.lora.{side}.weight"
        assert torch.equal(
            converted[f"model.layers.1.self_attn.{key}"], adapter["layers.1.attention.w" + key.replace("_proj", "")]
        )


def test_todays_upstream_files_load(tmp_path):
    """Half precision, and names with what DDP or torch.compile put before them."""
    adapter = random_adapter(3, targets=("q_proj", "o_proj"))
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        torch.save({prefix + name: tensor.half() for name, tensor in adapter.items()}, tmp_path / "new.pth")
        read = read_lora(tmp_path / "new.pth", small_model().config)
        torch.testing.assert_close(read, adapter, rtol=1e-3, atol=1e-3)


def test_a_damaged_or_diverged_adapter_is_refused(tmp_path):
    """Of such files a third loaded, with a changed adapter."""
    path, config = tmp_path / "lora" / "mine_32.pth", small_model().config
    adapter = random_adapter(3)
    save_weights(adapter, path)
    good, refused = path.read_bytes(), 0
    for copy in damaged_copies(good, 60):
        path.write_bytes(copy)
        try:
            assert same_weights(read_lora(path, config), adapter)
        except ValueError:
            refused += 1
    assert refused > 40
    adapter["model.layers.0.self_attn.q_proj.lora.A.weight"][1, 2] = float("inf")
    save_weights(adapter, path)
    with pytest.raises(ValueError, match="holds NaN or infinity in 1 tensors, first model.layers.0.*train_lora.py"):
        read_lora(path, config)


def test_what_does_not_fit_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="--dim and --use_moe that it was trained with"):
        load_lora(small_model(dim=48), random_adapter(0))
    with pytest.raises(ValueError, match="no projection of this model"):
        load_lora(small_model(), random_adapter(0, use_moe=True))
    adapter = random_adapter(0)
    del adapter[next(iter(adapter))]
    with pytest.raises(ValueError, match="half is missing"):
        load_lora(small_model(), adapter)
    with pytest.raises(ValueError, match=r"LoRA targets \['wq'\] do not exist: choose from q_proj"):
        apply_lora(small_model(), targets=("wq",))
    with pytest.raises(ValueError, match="rank 0"):
        apply_lora(small_model(), rank=0)
    config = small_model().config
    with pytest.raises(FileNotFoundError, match="none.pth not found: check the path"):
        read_lora(tmp_path / "none.pth", config)
    save_weights(small_model().state_dict(), tmp_path / "full.pth")
    with pytest.raises(ValueError, match="no LoRA file"):
        read_lora(tmp_path / "full.pth", config)


# The stage


def identity_rows(count: int) -> list[dict]:
    def talk(question: str) -> dict:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "我是小智。"}]
        return {"conversations": messages}

    return [talk(f"你是谁？{'？' * (i % 7)}") for i in range(count)]


@pytest.mark.parametrize("use_moe", [False, True])
def test_stage_writes_an_adapter_and_leaves_the_base_alone(use_moe, write_jsonl, tmp_path, capsys, tokenizer):
    """The directory is made (upstream L3), a MoE's file has its suffix (L8), the base is full_sft's (L4)."""
    config = LMConfig(dim=32, n_layers=1, use_moe=use_moe, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    base = MiniMindForCausalLM(config)
    path = weights_path(tmp_path, "full_sft", config)
    save_weights(base.state_dict(), path)
    before = path.read_bytes()
    data, general = write_jsonl(identity_rows(16)), write_jsonl(identity_rows(60), "general.jsonl")
    flags = ["--dim", "32", "--n_layers", "1", "--out_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
    flags += ["--data_path", str(data), "--general_data", str(general), "--device", "cpu", "--dtype", "float32"]
    flags += ["--lora_name", "lora_test", "--epochs", "3", "--batch_size", "4", "--use_moe", str(use_moe)]
    train_lora.main(flags)

    assert path.read_bytes() == before
    file = tmp_path / "lora" / f"lora_test_32{'_moe' if use_moe else ''}.pth"
    adapter = read_lora(file, config)
    assert {tensor.shape[-2] for name, tensor in adapter.items() if name.endswith("A.weight")} == {16}
    load_lora(base, adapter)
    assert any(tensor.any() for name, tensor in adapter.items() if name.endswith("B.weight")), "nothing was learned"
    log = capsys.readouterr().out
    assert "\nheld-out loss: " in log and "\ngeneral held-out loss: " in log
    total, trained = count_parameters(MiniMindForCausalLM(config)), sum(tensor.numel() for tensor in adapter.values())
    for line in (f"LLM总参数量：{total / 1e6:.3f} 百万 (不训练)", f"LoRA 参数量：{trained / 1e6:.3f} 百万",
                 f"LoRA 参数占比：{trained / total:.2%}"):  # fmt: skip
        assert log.count(f"{line}\n") == 1
    assert log.count("参数量") == 2, "each number once"


# Talking


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch, tokenizer):
    """ask(typed lines, *flags) -> (exit code, answers, everything printed), with adapters lora_a and lora_b there."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, vocab_size=len(tokenizer)))
    save_weights(model.state_dict(), weights_path(tmp_path, "full_sft", model.config))
    for seed, name in enumerate(("a", "b")):
        apply_lora(model, rank=2)
        train_adapter(model, seed)
        for parameter in model.parameters():
            parameter.data.mul_(5)
        save_weights(lora_state_dict(model), tmp_path / "lora" / f"lora_{name}_16.pth")

    def run(lines: list[str], *flags: str) -> tuple[int, list[str], str]:
        left = iter([*lines, ""])
        monkeypatch.setattr("builtins.input", lambda _: next(left))
        sizes = ["--dim", "16", "--n_layers", "1", "--out_dir", str(tmp_path), "--device", "cpu"]
        sampling = ["--temperature", "0", "--max_new_tokens", "8", "--show_speed", "0", "--test_mode", "1"]
        code = eval_model.main([*sizes, *sampling, *flags])
        out, err = capsys.readouterr()
        return code, [part.partition("\n")[0] for part in out.split("🤖️: ")[1:]], out + err

    return run


def test_eval_talks_with_an_adapter_and_changes_it_while_talking(ask):
    (base,), (a,), (b,) = (
        ask(["你好"], *flags)[1] for flags in ([], ["--lora_name", "lora_a"], ["--lora_name", "lora_b"])
    )
    assert len({base, a, b}) == 3
    lines = ["你好", "/lora lora_b", "你好", "/lora none", "你好", "/lora lora_a", "你好", "/lora lora_c", "你好"]
    code, answers, printed = ask(lines, "--lora_name", "lora_a", "lora_b")
    assert (code, answers) == (0, [a, b, base, a, a])
    assert "正在使用的 LoRA：lora_a；可选：lora_a、lora_b、none" in printed


def test_eval_takes_upstreams_none_and_a_path_and_names_what_is_missing(ask, tmp_path):
    assert ask(["你好"], "--lora_name", "None")[1] == ask(["你好"])[1]
    file = tmp_path / "lora" / "lora_a_16.pth"
    assert ask(["你好"], "--lora_weight", str(file))[1] == ask(["你好"], "--lora_name", "lora_a")[1]
    code, answers, printed = ask(["你好"], "--lora_name", "lora_c")
    assert code == 2 and not answers
    assert (
        "lora_c_16.pth not found: run `python train_lora.py --lora_name lora_c --dim 16 "
        f"--out_dir {tmp_path}` first" in printed
    )


def test_a_missing_adapter_names_those_of_other_sizes(tmp_path):
    small = MiniMindForCausalLM(LMConfig(dim=16, n_layers=2))
    apply_lora(small, rank=2)
    for folder, name in (("", "me_16"), ("quickstart", "me_16_moe"), ("", "me_too_16")):
        save_weights(lora_state_dict(small), tmp_path / folder / "lora" / f"{name}.pth")
    with pytest.raises(FileNotFoundError) as error:
        read_lora(lora_path(tmp_path, "me", LMConfig(dim=32, n_layers=1)), LMConfig(dim=32, n_layers=1))
    message = str(error.value)
    assert f"lora holds me_16.pth: pass --dim 16 --out_dir {tmp_path}\n" in message
    assert f"me_16_moe.pth: pass --dim 16 --use_moe --out_dir {tmp_path}/quickstart\n" in message
    assert "me_too" not in message and "or run `python train_lora.py --lora_name me --dim 32" in message


def test_the_remedy_for_a_missing_adapter_makes_exactly_that_file(tmp_path):
    config = LMConfig(dim=16, n_layers=1)
    with pytest.raises(FileNotFoundError) as error:
        read_lora(lora_path(tmp_path / "my runs", "a b", config), config)
    words = shlex.split(str(error.value).split("`")[1])
    assert words[:4] == ["python", "train_lora.py", "--lora_name", "a b"]
    assert words[-2:] == ["--out_dir", str(tmp_path / "my runs")]
    with pytest.raises(FileNotFoundError, match="--dim 16` first"):
        read_lora(lora_path("out", "nope", config), config)
    with pytest.raises(FileNotFoundError, match="elsewhere.pth not found: check the path"):
        read_lora(tmp_path / "elsewhere.pth", config)


def test_merged_weights_and_a_directory_of_peft_are_talked_to(ask, tmp_path):
    """They answer like weights and adapter."""
    script = [sys.executable, str(REPO_ROOT / "scripts" / "convert_model.py")]
    adapter = str(tmp_path / "lora" / "lora_a_16.pth")
    merge = [str(tmp_path / "full_sft_16.pth"), str(tmp_path / "merged_16.pth"), "--lora", adapter]
    for words in (merge, [adapter, str(tmp_path / "peft")]):
        done = subprocess.run([*script, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    expected = ask(["你好"], "--lora_name", "lora_a")[1]
    assert ask(["你好"], "--weight", "merged")[1] == expected
    assert ask(["你好"], "--lora_name", str(tmp_path / "peft"))[1] == expected
    assert ask(["你好"])[1] != expected
