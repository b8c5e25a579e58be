"""LoRA and peft: the same forward, merge and files, and nothing that peft sets is passed over."""

import json

import pytest
import torch
from test_lora import ATTENTION, logits, random_adapter, small_model, train_adapter

from model.adapters import PEFT_READ, PEFT_WITHOUT_EFFECT, read_lora, write_peft
from model.model_lora import LORA_TARGETS, apply_lora, load_lora, lora_state_dict, merge_lora


def write_adapter(adapter: dict[str, torch.Tensor], directory, **config) -> None:
    """For our own model, which has its queries and keys in Llama's order."""
    directory.mkdir(exist_ok=True)
    write_peft(adapter, directory, small_model(**config).config, "minimind")


def peft_logits(directory) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of peft's model with the adapter in a directory, and its weights after peft's merge."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(small_model(), str(directory)).eval()
    result = logits(model)
    return result, model.merge_and_unload().state_dict()


def test_peft_reads_what_we_write_and_computes_and_merges_the_same(tmp_path):
    model = small_model()
    apply_lora(model, rank=4, alpha=10.0)
    train_adapter(model)
    write_adapter(lora_state_dict(model), tmp_path / "peft")
    theirs, merged = peft_logits(tmp_path / "peft")
    torch.testing.assert_close(logits(model), theirs)
    merge_lora(model)
    torch.testing.assert_close(model.state_dict(), merged)


def peft_model(**options):
    """A model of peft with an adapter as `options` (of its LoraConfig) begin it."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(LORA_TARGETS), "init_lora_weights": False, **options}
    return get_peft_model(small_model(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"lora_alpha": 32}, {"use_rslora": True}, {"target_modules": ["v_proj"]}, {"lora_dropout": 0.3}),
        *({"layers_to_transform": [1]}, {"exclude_modules": ["o_proj"]}, {"target_modules": ".*[01].mlp.up_proj"}),
        *({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}),
        *({"init_lora_weights": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}),
    ],
    ids=str,
)
def test_we_read_what_peft_writes(options, tmp_path):
    theirs = peft_model(**options)
    train_adapter(theirs)
    theirs.save_pretrained(str(tmp_path / "peft"))
    model = small_model()
    load_lora(model, read_lora(tmp_path / "peft", model.config))
    torch.testing.assert_close(logits(model), logits(theirs))
    assert not torch.allclose(logits(theirs), logits(small_model()))


@pytest.mark.parametrize(
    "options",
    [
        *({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"}),
        *({"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}, {"alpha_pattern": {"q_proj": 2}}),
        *({"modules_to_save": ["norm"]}, {"trainable_token_indices": [3]}, {"layer_replication": [(0, 2), (1, 2)]}),
        {"target_modules": ["embed_tokens"]},
    ],
    ids=str,
)
def test_what_plain_lora_cannot_express_is_refused(options, tmp_path):
    """PiSSA and OLoRA move a part of the base weights into the adapter: read as plain LoRA, logits were off by 0.8."""
    peft_model(**options).save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(ValueError, match="merge it with peft"):
        read_lora(tmp_path / "peft", small_model().config)


def test_no_setting_of_peft_is_ignored(tmp_path):
    """Each is read, or without effect on what a saved adapter computes, or refused, also one never seen before."""
    from peft import LoraConfig

    write_adapter(random_adapter(0), tmp_path)
    settings, defaults = json.loads((tmp_path / "adapter_config.json").read_text()), LoraConfig().to_dict()
    for name in [*(defaults.keys() - PEFT_READ - PEFT_WITHOUT_EFFECT), "invented"]:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, name: {"x": 1}}))
        with pytest.raises(ValueError, match=f"no plain LoRA on the base model .{name}: "):
            read_lora(tmp_path, small_model().config)
        assert not defaults.get(name), "peft's default must pass"
    for change in (
        {"peft_type": "LOHA"},
        {"bias": "all"},
        *({"init_lora_weights": i} for i in ("corda", "loftq", "new")),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match="no plain LoRA on the base model"):
            read_lora(tmp_path, small_model().config)


def test_a_pissa_adapter_that_peft_converts_is_read(tmp_path):
    """The way out that the refusal names."""
    start, end = str(tmp_path / "start"), str(tmp_path / "end")
    theirs = peft_model(init_lora_weights="pissa")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(start)
    train_adapter(theirs)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(end, path_initial_model_for_weight_conversion=start)
    model = small_model()
    load_lora(model, read_lora(end, model.config))
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)


def test_damaged_peft_directories_are_refused(tmp_path):
    write_adapter(random_adapter(0), tmp_path)
    settings, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good, sound = tensors.read_bytes(), settings.read_text()
    for name, content in ((tensors, good[:1000]), (settings, b"{"), (settings, b"[]"), (settings, b'{"r": 4}')):
        name.write_bytes(content)
        with pytest.raises(ValueError, match="copy or make it again"):
            read_lora(tmp_path, small_model().config)
        tensors.write_bytes(good)
        settings.write_text(sound)
    write_adapter({name: tensor * torch.inf for name, tensor in random_adapter(0).items()}, tmp_path)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        read_lora(tmp_path, small_model().config)
    settings.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json not found"):
        read_lora(tmp_path, small_model().config)


def test_routed_experts_cannot_be_written_for_peft(tmp_path):
    with pytest.raises(ValueError, match="no adapters of routed experts: train with --lora_targets"):
        write_adapter(random_adapter(0, use_moe=True), tmp_path)
    write_adapter(random_adapter(0, use_moe=True, targets=ATTENTION), tmp_path)
