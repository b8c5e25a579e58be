"""A GGUF file on its own: what it says of the model and the tokenizer is what was put in, or it is not written."""

import json
import struct
from unittest.mock import patch

import gguf
import pytest
import torch
from tiny_model import make_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from model.gguf_file import write_gguf
from model.gguf_reader import check_gguf, gguf_config, gguf_tokenizer
from model.loading import load_tokenizer, save_weights
from model.record import write_record
from model.rotary import rotary_frequencies
from scripts.convert_model import main

SIZES = {"n_heads": 4, "dim": 64, "n_layers": 1, "hidden_dim": 96, "max_seq_len": 256}
YARN = {"rope_type": "yarn", "factor": 3.3, "original_max_position_embeddings": 100}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def changed(tokenizer, change) -> PreTrainedTokenizerFast:
    """A tokenizer after `change` of what its tokenizer.json says."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    control = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **control)


def write(path, tokenizer, **fields):
    model = make_model(**{**SIZES, "vocab_size": 6400, **fields})
    write_gguf(path, model.config, model.state_dict(), tokenizer, "f16")
    return model.config


@pytest.mark.parametrize(
    "scaling",
    [YARN, {**YARN, "attention_factor": 1.9}, {"type": "yarn", "factor": 4}, {"type": "linear", "factor": 3.3}],
)
def test_the_stretching_of_positions_comes_back(tmp_path, tokenizer, scaling):
    """Yarn's attention_factor was not in the file: llama.cpp computed another model."""
    config = write(tmp_path / "m.gguf", tokenizer, rope_scaling=scaling)
    read = gguf_config(tmp_path / "m.gguf")
    (angles, factor), (read_angles, read_factor) = (rotary_frequencies(c, torch.device("cpu")) for c in (config, read))
    assert torch.allclose(angles, read_angles, rtol=1e-6) and factor == pytest.approx(read_factor, rel=1e-6)
    check_gguf(tmp_path / "m.gguf", config, tokenizer, "水 is water.")
    if "attention_factor" in scaling:  # llama.cpp multiplies it by 0.1 ln(factor) + 1
        stored = gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.rope.scaling.attn_factor"].contents()
        assert stored == pytest.approx(1.9 / 1.1193922, rel=1e-6)


def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path, tokenizer):
    with patch("gguf.GGUFWriter.add_rope_scaling_type"):
        write(tmp_path / "m.gguf", tokenizer, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert gguf_config(tmp_path / "m.gguf").rope_scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "scaling, reason",
    [
        ({**YARN, "beta_fast": 4.0}, "beta_fast 32 here: rope_scaling has 4.0"),
        ({**YARN, "beta_slow": 0.25}, "beta_slow 1 here: rope_scaling has 0.25"),
        ({**YARN, "original_max_position_embeddings": 100.5}, "as a whole number: rope_scaling has 100.5"),
    ],
)
def test_yarn_that_llama_cpp_does_not_read_is_refused(tmp_path, tokenizer, scaling, reason):
    with pytest.raises(ValueError, match=reason):
        write(tmp_path / "m.gguf", tokenizer, rope_scaling=scaling)
    assert list(tmp_path.iterdir()) == []


def test_a_hole_in_the_vocabulary_stays_where_it_is(tmp_path, tokenizer):
    """All tokens behind the hole were one number lower in the file."""

    def move_the_last(content):
        vocabulary = content["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[last] += 2

    gapped = changed(tokenizer, move_the_last)
    config = write(tmp_path / "m.gguf", gapped, vocab_size=6404)
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[6399:6401] == ["[PAD6399]", "[PAD6400]"] and tokens[6402:] == ["[PAD6402]", "[PAD6403]"]
    assert gguf_tokenizer(tmp_path / "m.gguf").get_vocab() == gapped.get_vocab()
    check_gguf(tmp_path / "m.gguf", config, gapped, "水 is water.")
    with pytest.raises(ValueError, match="is number 6401, and the model has 6400 tokens"):
        write(tmp_path / "n.gguf", gapped)


ADDS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []}
ADDS["single"].append({"Sequence": {"id": "A", "type_id": 0}})
ADDS["pair"] = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
ADDS["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda content: content.update(normalizer={"type": "Lowercase"}), 'the normalizer {"type": "Lowercase"}'),
        (lambda content: content["model"].update(ignore_merges=True), "ignore_merges True"),
        (lambda content: content["model"].update(dropout=0.5), "dropout 0.5"),
        (lambda content: content.update(post_processor=ADDS), "a post_processor that adds tokens"),
        (lambda content: content["added_tokens"][3].update(lstrip=True), "lstrip of <think>"),
        (lambda content: content["added_tokens"][3].update(rstrip=True), "rstrip of <think>"),
    ],
)
def test_what_gguf_cannot_hold_of_a_tokenizer_is_refused(tmp_path, tokenizer, change, named):
    with pytest.raises(ValueError) as error:
        write(tmp_path / "m.gguf", changed(tokenizer, change))
    assert f"GGUF cannot hold this of the tokenizer: {named}" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "forgotten, lost",
    [
        ("add_rope_scaling_attn_factors", "rope_theta and rope_scaling (1000000.0, {'rope_type': 'yarn'"),
        ("add_unk_token_id", "the tokenizer: its control tokens"),
        ("add_chat_template", "the tokenizer: its chat template"),
    ],
)
def test_a_conversion_reads_the_file_on_its_own(tmp_path, capsys, forgotten, lost):
    """What was read back was the tensors alone, under the configuration and tokenizer of the source."""
    model = make_model(**SIZES, vocab_size=6400, rope_scaling={**YARN, "attention_factor": 1.9})
    save_weights(model.state_dict(), tmp_path / "m.pth")
    write_record(tmp_path / "m.pth", model.config)
    with patch(f"gguf.GGUFWriter.{forgotten}"), pytest.raises(SystemExit):
        main([str(tmp_path / "m.pth"), str(tmp_path / "m.gguf")])
    assert lost in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.pth"]


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY])
def test_a_list_that_is_longer_than_the_file_is_refused_at_once(tmp_path, kind):
    """A few bytes that declare 2**40 numbers kept the program busy for hours; here are fewer, not to hang."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = b"general.architecture"
    (tmp_path / "m.gguf").write_bytes(
        header + struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, 2**16)
    )
    with pytest.raises(ValueError, match=r"is no GGUF file, or cut off or damaged \(it declares .* and has 68\)"):
        gguf_config(tmp_path / "m.gguf")
