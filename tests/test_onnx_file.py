"""ONNX files: onnxruntime computes the same for every batch and length, with nothing but numpy and the tokenizer."""

import re

import numpy as np
import onnxruntime
import pytest
import torch
from test_convert_model import KINDS, random_model

from model import conversion, onnx_file
from model.loading import REPO_ROOT, load_tokenizer, save_weights
from model.record import write_record
from scripts.convert_model import main


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Ernie4_5_MoeForCausalLM"])
def test_onnxruntime_computes_the_same(tmp_path, kind, capsys):
    model = random_model(**KINDS[kind])
    save_weights(model.state_dict(), tmp_path / "m.pth")
    write_record(tmp_path / "m.pth", model.config)
    main([str(tmp_path / "m.pth"), str(tmp_path / "minimind.onnx")])
    assert "minimind.onnx: onnxruntime's logits are " in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "minimind.onnx")
    for shape in ((1, 1), (3, 20), (2, 33)):
        ids = torch.randint(3, 6400, shape)
        with torch.no_grad():
            expected = model(ids).logits.numpy()
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    # Padding on the right changes nothing before it.
    (padded,) = session.run(None, {"input_ids": np.pad(ids.numpy(), ((0, 0), (0, 4)))})
    assert np.abs(padded[:, :33] - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_program_of_the_document_answers(tmp_path, monkeypatch, capsys):
    model = random_model()
    monkeypatch.chdir(tmp_path)
    save_weights(model.state_dict(), tmp_path / "m.pth")
    main(["m.pth", "minimind.onnx"])
    text = (REPO_ROOT / "docs" / "where_it_runs_en.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import numpy.*?onnxruntime.*?)```", text, flags=re.S)
    capsys.readouterr()
    exec(program.replace("prompt + 64", "prompt + 8"), {})  # noqa: S102
    answer = capsys.readouterr().out.rstrip("\n")
    tokenizer = load_tokenizer()
    question = "<s>user\n法国的首都是哪里？</s>\n<s>assistant\n"
    prompt = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    expected = expected[0, prompt.shape[1] :].tolist()
    assert answer == tokenizer.decode([token for token in expected if token != 2], skip_special_tokens=True)


def test_a_file_with_other_logits_is_not_kept(tmp_path, monkeypatch, capsys):
    save_weights(random_model(use_moe=True).state_dict(), tmp_path / "m.pth")
    monkeypatch.setattr(onnx_file.EveryExpert, "forward", lambda self, x: (x, self.gate(x)))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "m.pth"), str(tmp_path / "x.onnx")])
    assert "onnxruntime computes other logits" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_what_is_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    model = random_model()
    monkeypatch.setattr(onnx_file, "LARGEST", 1_000_000)
    with pytest.raises(ValueError, match="weights are 0.0 GB: write a folder"):
        conversion.write_onnx(tmp_path / "x.onnx", model.config, model.state_dict())
