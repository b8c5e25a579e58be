"""model/gguf_file.py: what is written is read back, in every quantisation and architecture of ours."""

import gguf
import numpy as np
import pytest
import torch
from tiny_model import make_model

from model.gguf_file import QUANTISATIONS, check_rounding, gguf_architecture, modelfile, read_gguf_tensors, write_gguf
from model.LMConfig import PUBLISHED, LMConfig
from model.loading import load_tokenizer
from model.model import MiniMindForCausalLM

SIZES = {"n_heads": 8, "vocab_size": 6400, "dim": 64, "n_layers": 2, "hidden_dim": 96}
V3 = {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6}
CASES = {
    "llama": {},
    "ernie4_5-moe": {"use_moe": True},
    "qwen3": V3,
    "qwen3moe": {**V3, "use_moe": True, "n_shared_experts": False, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def random_model(**fields) -> MiniMindForCausalLM:
    return make_model(**{**SIZES, **fields})


def field(reader: gguf.GGUFReader, name: str):
    return reader.fields[name].contents()


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("architecture", CASES)
def test_tensors_come_back(architecture, quantisation, tmp_path, tokenizer):
    model = random_model(**CASES[architecture])
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, model.state_dict(), tokenizer, quantisation)
    assert field(gguf.GGUFReader(path), "general.architecture") == architecture
    read = read_gguf_tensors(path, model.config)
    assert read.keys() == model.state_dict().keys()
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 or name.endswith("mlp.gate.weight") or quantisation == "f32":
            expected = tensor
        elif quantisation in dtypes:
            expected = tensor.to(dtypes[quantisation]).float()
        else:
            levels = 127 if quantisation == "q8_0" or name.endswith(("embed_tokens.weight", "lm_head.weight")) else 7
            blocks, back = tensor.unflatten(-1, (-1, 32)), read[name].unflatten(-1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / levels  # one scale for 32 numbers, stored as float16
            assert ((blocks - back).abs() <= step * 1.01).all(), name
            continue
        assert torch.equal(read[name], expected), name


def test_rotary_pairs_stand_where_llama_cpp_turns_them(tmp_path, tokenizer):
    """Side by side for llama, half a head apart for qwen3; v is not turned."""
    for fields, neighbours in (({}, True), (V3, False)):
        model = random_model(**fields)
        write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer, "f32")
        stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        ours = model.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
        C = model.config.head_dim
        second = stored["blk.1.attn_q.weight"][1]
        assert np.array_equal(second, ours[C // 2] if neighbours else ours[1])
        values = model.state_dict()["model.layers.1.self_attn.v_proj.weight"].numpy()
        assert np.array_equal(stored["blk.1.attn_v.weight"], values)


def test_sizes_and_tokenizer_are_in_the_file(tmp_path, tokenizer):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    model = random_model(use_moe=True, rope_scaling=scaling, rope_theta=1e5, max_seq_len=2048)
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer, "f16", name="my model")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    expected = {
        "general.name": "my model",
        "general.file_type": 1,
        "ernie4_5-moe.context_length": 2048,
        "ernie4_5-moe.embedding_length": 64,
        "ernie4_5-moe.block_count": 2,
        "ernie4_5-moe.attention.head_count": 8,
        "ernie4_5-moe.attention.head_count_kv": 2,
        "ernie4_5-moe.rope.freq_base": 1e5,
        "ernie4_5-moe.rope.scaling.type": "yarn",
        "ernie4_5-moe.rope.scaling.factor": 4.0,
        "ernie4_5-moe.rope.scaling.original_context_length": 512,
        "ernie4_5-moe.expert_count": 4,
        "ernie4_5-moe.expert_used_count": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {name: field(reader, name) for name in expected} == expected
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert tokens == tokenizer.convert_ids_to_tokens(range(6400)) and len(types) == 6400
    kinds = {token: types[i] for i, token in enumerate(tokens)}
    assert kinds["</s>"] == gguf.TokenType.CONTROL and kinds["<think>"] == gguf.TokenType.USER_DEFINED
    assert kinds[tokens[-1]] == gguf.TokenType.NORMAL


def test_what_cannot_be_written_leaves_nothing(tmp_path, tokenizer):
    for fields, quantisation, reason in (
        ({"dim": 48, "hidden_dim": 96}, "q8_0", "blocks of 32"),
        ({"use_moe": True, "qk_norm": True}, "f16", "no norms of q and k"),
        ({"use_moe": True, "num_experts_per_tok": 1}, "f16", "num_experts_per_tok is 1"),
    ):
        model = random_model(**fields)
        with pytest.raises(ValueError, match=reason):
            write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer, quantisation)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_an_architecture_in_llama_cpp(name):
    config = LMConfig(**PUBLISHED[name])
    assert (gguf_architecture(config) in ("ernie4_5-moe", "qwen3moe")) == config.use_moe
    assert config.dim % 32 == 0 and config.intermediate_size % 32 == 0


def test_the_modelfile_says_the_chat_format(tokenizer):
    text = modelfile("minimind-f16.gguf", 2048, "<s>", "</s>")
    assert text.startswith("FROM ./minimind-f16.gguf\n") and 'PARAMETER stop "</s>"' in text
    template = text.split('"""')[1]
    branches = dict(zip(("system", "user", "assistant"), template.split("eq .Role")[1:], strict=True))
    for role, branch in branches.items():
        body = branch.split("}}", 1)[1].split("{{ else")[0].split("{{ end")[0].replace("{{ .Content }}", "你好")
        messages = [{"role": role, "content": "你好"}]
        assert body == tokenizer.apply_chat_template(messages, tokenize=False)
    assert template.endswith("<s>assistant\n")
    assert "<s>" not in modelfile("x.gguf", 2048, "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("stored", QUANTISATIONS)
def test_numbers_are_held_to_what_their_type_rounds(stored, tmp_path, tokenizer):
    model = random_model()
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, stored)
    read = read_gguf_tensors(tmp_path / "m.gguf", model.config)
    check_rounding(read, model.state_dict(), stored)
    read["model.layers.1.mlp.up_proj.weight"][3] *= 1.3
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight would hold other numbers"):
        check_rounding(read, model.state_dict(), stored)


def test_rows_without_a_token_have_a_name(tmp_path, tokenizer):
    config = LMConfig(dim=64, n_layers=1, vocab_size=len(tokenizer) + 3)
    tensors = MiniMindForCausalLM(config).state_dict()
    write_gguf(tmp_path / "m.gguf", config, tensors, tokenizer, "f32")
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == config.vocab_size and tokens[-1] == f"[PAD{config.vocab_size - 1}]"
