"""model/opening.py and model/vocabulary.py: whatever names a model opens it, everywhere, with the right tokenizer."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stages import SAMPLE
from tiny_model import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toy import same_weights
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import eval_model
import train_distillation
import train_full_sft
import train_lora
from model.chat_format import ChatFormat
from model.gguf_file import write_gguf
from model.layouts import LAYOUTS, from_ours
from model.LMConfig import config_fields
from model.loading import load_tokenizer
from model.opening import describe, is_foreign, is_path, open_model
from model.record import fingerprint, read_record
from model.vocabulary import tokenizer_of
from scripts import convert_model

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 256}
SFT = SAMPLE / "sft.jsonl"
KINDS = ("pth", "folder", "gguf")
NAMES = {"pth": "m_64.pth", "folder": "folder", "gguf": "m.gguf"}


@pytest.fixture(scope="module")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """400 tokens, named as MiniMind's are since 2025-04, and split as they were until then: another vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([SFT.read_text(encoding="utf-8")[:20000]], trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=special[0], pad_token=special[0], bos_token=special[1],
        eos_token=special[2], chat_template=template,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models_of_both(tmp_path_factory, other_tokenizer) -> dict[str, Path]:
    """A directory for each tokenizer, with one model as a .pth file, a folder and a GGUF file."""
    places = {}
    for name, tokenizer in (("ours", load_tokenizer()), ("other", other_tokenizer)):
        place = places[name] = tmp_path_factory.mktemp(name)
        model = make_model(**SIZES, vocab_size=len(tokenizer), rope_theta=1e4)
        model.save_pretrained(place / "saved")
        tokenizer.save_pretrained(place / "saved")
        convert_model.main([str(place / "saved"), str(place / "folder")])
        convert_model.main([str(place / "folder"), str(place / "m_64.pth")])
        convert_model.main([str(place / "m_64.pth"), str(place / "m.gguf"), "--dtype", "f32"])
    return places


@pytest.fixture
def train(tmp_path):
    """Run a stage on a few rows; the place where it writes."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(SFT.read_text(encoding="utf-8").splitlines()[:40]) + "\n", encoding="utf-8")

    def run(*flags: object, stage=train_full_sft) -> Path:
        quick = "--max_steps 2 --batch_size 4 --device cpu --dtype float32 --num_workers 0 --save_interval 0".split()
        place = ["--data_path", rows, "--out_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
        stage.main([*quick, *map(str, place), "--heldout_share", "0.1", *map(str, flags)])
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("whose", ["ours", "other"])
def test_every_kind_is_the_same_model_with_the_same_tokenizer(models_of_both, whose, other_tokenizer):
    place = models_of_both[whose]
    expected = load_tokenizer() if whose == "ours" else other_tokenizer
    opened = [open_model(place / NAMES[kind], {}) for kind in KINDS]
    text = "你好，12345 hello\n\n  def f(x): return '😀'"
    for source in opened:
        assert same_weights(source.tensors, opened[0].tensors)
        assert (source.config.rope_theta, source.config.n_heads, source.config.norm_eps) == (1e4, 8, 1e-5)
        assert source.tokenizer.encode(text) == expected.encode(text)
        assert ChatFormat(source.tokenizer).fingerprint() == ChatFormat(expected).fingerprint()
        assert (source.config.bos_token_id, source.config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_every_kind_and_the_tokenizer_travels(models_of_both, tmp_path, train, kind, capsys):
    """A folder could only be talked to, and its tokenizer was never that of the training."""
    shutil.copytree(models_of_both["other"], tmp_path / "start")
    start = tmp_path / "start" / NAMES[kind]
    out = train("--from_weight", start)
    record, _ = read_record(out / "full_sft_64.pth")
    assert record["started_from"] == {"weights": start.as_posix(), "fingerprint": fingerprint(start)}
    assert (record["config"].rope_theta, record["config"].vocab_size) == (1e4, 400)
    train("--from_weight", start, "--resume")
    assert "this run is already complete" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "start")

    beside = out / f"tokenizer-{record['tokenizer'][:8]}"
    assert AutoTokenizer.from_pretrained(beside).bos_token == "<|im_start|>"
    train("--from_weight", "full_sft", "--lora_name", "a", stage=train_lora)
    assert eval_model.main(["--out_dir", str(out), "--dim", "64", "--prompt", "你好", "--max_new_tokens", "2"]) == 0
    convert_model.main([str(out / "full_sft_64.pth"), str(tmp_path / "back")])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "back")) == 400
    adapter = ["--lora", str(out / "lora" / "a_64.pth")]
    convert_model.main([str(out / "full_sft_64.pth"), str(out / "merged_64.pth"), *adapter])
    assert read_record(out / "merged_64.pth")[0]["tokenizer"] == record["tokenizer"]

    vocabulary = beside / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"<|im_end|>"', '"<|im_over|>"'))
    assert eval_model.main(["--out_dir", str(out), "--dim", "64", "--prompt", "你好"]) == 2
    assert f"{beside} was changed" in capsys.readouterr().err
    shutil.rmtree(beside)
    with pytest.raises(SystemExit):
        train("--from_weight", "full_sft", "--save_weight", "more")
    message = capsys.readouterr().err
    assert f"{beside} is not there" in message and "--tokenizer_path" in message


def test_another_start_is_another_run(models_of_both, tmp_path, train, capsys):
    shutil.copytree(models_of_both["ours"] / "folder", tmp_path / "folder")
    train("--from_weight", tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        train("--from_weight", tmp_path / "folder", "--resume")
    assert "starting weights: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_of_every_kind_too(models_of_both, train, kind, capsys):
    place = models_of_both["other"]
    flags = ["--from_weight", place / "m_64.pth", "--teacher_path"]
    out = train(*flags, place / NAMES[kind], stage=train_distillation)
    teacher = read_record(out / "full_dist_64.pth")[0]["teacher"]
    assert teacher["fingerprint"] == fingerprint(place / NAMES[kind])
    with pytest.raises(SystemExit):
        train(*flags, models_of_both["ours"] / NAMES[kind], "--save_weight", "x", stage=train_distillation)
    assert "of the student's 400 tokens by the same number" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--load", "1"], ["--weight"], ["--load_from"]])
def test_eval_model_takes_every_kind_by_every_flag(models_of_both, flag, capsys):
    answers = []
    for kind in KINDS:
        path = str(models_of_both["other"] / NAMES[kind])
        greedy = ["--prompt", "你好", "--max_new_tokens", "4", "--temperature", "0", "--show_speed", "False"]
        assert eval_model.main([*flag, path, *greedy]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]


def test_flags_against_what_lies_there(models_of_both, capsys):
    for kind, how in (("folder", "its config.json says"), ("gguf", "its metadata say")):
        with pytest.raises(SystemExit):
            eval_model.main(["--load", "1", str(models_of_both["ours"] / NAMES[kind]), "--rope_theta", "5"])
        message = capsys.readouterr().err
        assert "--rope_theta 5.0 contradicts rope_theta 10000.0" in message and how in message


def test_a_vocabulary_is_never_guessed(models_of_both, tmp_path, other_tokenizer):
    weights = tmp_path / "full_sft_64.pth"
    shutil.copy(models_of_both["other"] / "m_64.pth", weights)  # without its record
    with pytest.raises(ValueError, match="has rows for 400 tokens, but .* has 6400, .*pass that one with --tokenizer"):
        tokenizer_of(weights, 400)
    other_tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer_of(weights, 400, str(tmp_path / "tokenizer"))) == 400
    assert describe(models_of_both["ours"] / "m_64.pth", {})[1] == []
    shutil.copy(models_of_both["ours"] / "m_64.pth", weights)
    assert "its tokens are those of model/minimind_tokenizer" in describe(weights, {})[1][0]


def test_a_gguf_file_may_be_quantised_and_a_mixture(tmp_path, other_tokenizer):
    path = tmp_path / "m.gguf"
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    for fields in ({"use_moe": True}, {"qk_norm": True, "norm_eps": 1e-6}, scaled):
        model = make_model(**SIZES, vocab_size=400, **fields)
        for dtype in ("f16", "bf16", "q8_0", "q4_0"):
            write_gguf(path, model.config, model.state_dict(), other_tokenizer, dtype)
            source = open_model(path, {})
            assert config_fields(source.config) == config_fields(model.config), (fields, dtype)
            assert source.model().config.intermediate_size == 96


def test_a_gguf_file_with_parts_that_minimind_has_not_is_refused(tmp_path, other_tokenizer):
    """Architectures are shared with many models: what the metadata say beyond MiniMind's is another model."""
    model, path = make_model(**SIZES, vocab_size=400), tmp_path / "m.gguf"

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self):
            self.add_sliding_window(128)
            super().write_header_to_file()

    with patch("gguf.GGUFWriter", Writer):
        write_gguf(path, model.config, model.state_dict(), other_tokenizer, "f16")
    with pytest.raises(ValueError, match="is another llama than MiniMind: llama.attention.sliding_window is 128"):
        open_model(path, {})


def test_names_of_stages_and_paths(models_of_both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full_sft").mkdir()
    assert is_path("x.pth") and is_path("x.gguf") and not is_path("full_sft") and is_path("./full_sft")
    assert is_path(str(models_of_both["ours"] / "folder")) and not is_foreign(models_of_both["ours"] / "folder")


# Strangers' files: each is refused by every program, with what was found, and nothing is run or written.


class Trap:
    """Its pickle writes a file when it is opened as pickles usually are."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def strangers(place: Path, models: dict[str, Path]) -> dict[str, str]:
    """Files that are no model of ours, in `place`: name -> what is said of it."""
    folder, weights = models["ours"] / "folder", models["ours"] / "m_64.pth"
    state = torch.load(weights, weights_only=True)
    torch.save({"transformer.wte.weight": torch.zeros(4, 4)}, place / "keys.pth")
    lacking = {name: tensor for name, tensor in state.items() if not name.startswith("model.layers.0.")}
    torch.save(lacking, place / "layer.pth")
    lacking = {name: tensor for name, tensor in state.items() if name != "model.layers.1.mlp.up_proj.weight"}
    torch.save(lacking, place / "tensor.pth")
    other = torch.load(models["other"] / "m_64.pth", weights_only=True)
    torch.save(from_ours(other, LAYOUTS["2025-02"], 8), place / "vocabulary.pth")
    (place / "short.pth").write_bytes(weights.read_bytes()[:9000])
    torch.save({"model.embed_tokens.weight": Trap(place / "trap")}, place / "code.pth")
    (place / "text.gguf").write_text("GGUF" * 100)
    whole = (models["ours"] / "m.gguf").read_bytes()
    (place / "short.gguf").write_bytes(whole[: len(whole) // 2])
    (place / "theirs.gguf").write_bytes(whole.replace(b"llama", b"gemma"))
    for name in ("code", "short", "bare", "gpt2", "size", "own"):
        shutil.copytree(folder, place / name)
    (place / "code" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap(place / "trap")}, place / "code" / "pytorch_model.bin")
    (place / "short" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9000])
    (place / "bare" / "tokenizer.json").unlink()
    os.mkfifo(place / "pipe.pth")
    os.mkfifo(place / "pipe.gguf")
    theirs = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (place / "own" / "tokenizer_config.json").write_text(json.dumps(theirs))
    AutoConfig.for_model("gpt2").save_pretrained(place / "gpt2")
    fields = json.loads((folder / "config.json").read_text())
    (place / "size" / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 3}))
    return {
        "keys.pth": "its names begin with transformer.wte.weight; known are names like",
        "layer.pth": "model.layers.0.self_attn.k_proj.weight is missing: it is no whole model",
        "tensor.pth": "model.layers.1.mlp.up_proj.weight missing",
        "vocabulary.pth": "has rows for 400 tokens",
        "short.pth": "is cut off or damaged",
        "code.pth": "holds more than tensors and was not opened",
        "text.gguf": "is no GGUF file",
        "short.gguf": "is no GGUF file, or cut off",
        "theirs.gguf": "is a model of architecture 'gemma'",
        "code": "pytorch_model.bin holds more than tensors and was not opened",
        "short": "model.safetensors is cut off or damaged",
        "pipe.pth": "pipe.pth is a pipe or a device, no file",
        "pipe.gguf": "pipe.gguf is a pipe or a device, no file",
        "own": "own needs code of its author",
        "bare": "bare holds no tokenizer.json",
        "gpt2": "gpt2",
        "size": "says n_layers 3, but its tensors show 2",
    }


def test_strangers_files_are_refused_everywhere(models_of_both, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = strangers(tmp_path, models_of_both)
    data = f"--data_path {SFT} --out_dir out --cache_dir cache --device cpu".split()
    ours = str(models_of_both["ours"] / "m_64.pth")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name, reason in expected.items():
        commands = {
            train_full_sft: [*data, "--from_weight", f"./{name}"],
            train_distillation: [*data, "--from_weight", ours, "--teacher_path", name],
            eval_model: ["--load", "1", name, "--prompt", "x"],
            convert_model: [name, "converted"],
        }
        for program, flags in commands.items():
            try:
                code = program.main(flags)
            except SystemExit as exit:
                code = exit.code
            message = capsys.readouterr().err
            assert code == 2 and reason in message, (program.__name__, name, message)
            after = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
            assert after == before, (program.__name__, name)
