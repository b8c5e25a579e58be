"""Our own class in a folder with its code: it runs where this repository is not, and says so when it does not."""

import ast
import os
import subprocess
import sys

import pytest
import torch
from test_convert_model import random_model

from model import own_code
from model.loading import REPO_ROOT, save_weights
from model.record import write_record
from scripts.convert_model import main

NTK = {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}
ODD_MIXTURE = {"use_moe": True, "norm_topk_prob": False}
ELSEWHERE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
backbone = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(5, 25)[None]
assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)
assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("你好")["input_ids"]
model.save_pretrained(sys.argv[2])
print(model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None).tolist())
try:
    import model as ours
except ModuleNotFoundError:
    print("ours is not here")
"""


def write(path, **fields):
    model = random_model(**fields)
    save_weights(model.state_dict(), path)
    write_record(path, model.config)
    return model


def test_what_no_architecture_computes_is_offered_our_class(tmp_path, capsys):
    for name, fields in {"ntk_64": NTK, "odd_64_moe": ODD_MIXTURE}.items():
        write(tmp_path / f"{name}.pth", **fields)
        with pytest.raises(SystemExit):
            main([str(tmp_path / f"{name}.pth"), str(tmp_path / "x")])
        assert "--architecture minimind writes a folder with our own class" in capsys.readouterr().err


def test_it_answers_the_same_in_a_process_that_cannot_import_this_repository(tmp_path, capsys):
    model = write(tmp_path / "m_64_moe.pth", **NTK, **ODD_MIXTURE)
    folder, saved = tmp_path / "folder-1.0", tmp_path / "saved"  # a name that is no Python name
    main([str(tmp_path / "m_64_moe.pth"), str(folder), "--architecture", "minimind"])
    assert "folder-1.0: MiniMindForCausalLM, its logits are 0.0e+00 from ours" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(folder), str(saved)],
        cwd=tmp_path, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    expected = model.generate(torch.arange(5, 25)[None], max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert done.stdout.splitlines()[-2:] == [str(expected.tolist()), "ours is not here"], done.stderr
    # What transformers saved of it there is read here, and so is the folder itself.
    for source in (folder, saved):
        if source is saved:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (saved / name).write_bytes((folder / name).read_bytes())
        main([str(source), str(tmp_path / f"{source.name}.pth")])
        back = torch.load(tmp_path / f"{source.name}.pth")
        assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_every_module_that_the_network_imports_is_copied():
    """One that is missing would be noticed by the conversion, and it should not be made to fail."""
    needed, seen = {"model.py"}, set()
    while needed - seen:
        name = (needed - seen).pop()
        seen.add(name)
        for node in ast.walk(ast.parse((REPO_ROOT / "model" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                needed.add(f"{node.module}.py")
            elif isinstance(node, ast.ImportFrom | ast.Import):
                assert not {"common", "model"} & {alias.name.partition(".")[0] for alias in node.names}
    assert seen == set(own_code.CODE)


def test_a_folder_that_does_not_load_elsewhere_is_not_kept(tmp_path, monkeypatch, capsys):
    write(tmp_path / "m_64.pth")
    monkeypatch.setattr(own_code, "CODE", tuple(name for name in own_code.CODE if name != "moe.py"))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "m_64.pth"), str(tmp_path / "x"), "--architecture", "minimind"])
    assert "transformers cannot load" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m_64.json", "m_64.pth"]
