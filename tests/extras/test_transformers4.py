"""transformers 4.57: exports load without our code and answer as our model does."""

import pytest
from engines import FIELDS, ask, export, greedy, make_model, prompts
from transformers import AutoModelForCausalLM

from model.conversion import STORED_TYPES

ENVIRONMENT = ".venv-transformers4"


@pytest.mark.parametrize("kind", [*FIELDS, "quickstart"])
def test_the_same_64_tokens_in_float32(tmp_path, kind):
    model = make_model(kind)
    folder = export(model, kind, tmp_path / "folder")
    expected = [greedy(model, prompt) for prompt in prompts()]
    assert min(len(set(answer)) for answer in expected) > 3  # no stammering
    native = AutoModelForCausalLM.from_pretrained(folder)
    assert [greedy(native, prompt) for prompt in prompts()] == expected
    assert ask(ENVIRONMENT, "transformers_greedy.py", str(folder), "float32") == expected


@pytest.mark.parametrize("stored", ["f16", "bf16"])
@pytest.mark.parametrize("kind", [*FIELDS, "quickstart"])
def test_half_precision_exports_answer_as_in_transformers_5(tmp_path, kind, stored):
    """In their own type, where both round alike."""
    model, dtype = make_model(kind), STORED_TYPES[stored]
    folder = export(model, kind, tmp_path / "folder", stored)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = [greedy(native, prompt) for prompt in prompts()]
    assert ask(ENVIRONMENT, "transformers_greedy.py", str(folder), str(dtype).removeprefix("torch.")) == expected
