"""vLLM on a CPU: exports load without our code and answer as our model does."""

import pytest
from engines import FIELDS, ask, export, greedy, make_model, prompts, rounded, shortfall

from model.conversion import STORED_TYPES

ENVIRONMENT = ".venv-vllm"


@pytest.mark.parametrize("kind", [*FIELDS, "quickstart"])
def test_the_same_64_tokens_in_float32(tmp_path, kind):
    model = make_model(kind)
    expected = [greedy(model, prompt) for prompt in prompts()]
    folder = export(model, kind, tmp_path / "folder")
    theirs = ask(ENVIRONMENT, "vllm_greedy.py", str(folder), "float32")
    behind = max(shortfall(model, prompt, answer) for prompt, answer in zip(prompts(), theirs, strict=True))
    print(f"{kind}: {sum(a == b for a, b in zip(theirs, expected, strict=True))} equal, {behind:.5f} behind")
    assert theirs == expected


@pytest.mark.parametrize("stored", ["f16", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "ernie4_5_moe", "quickstart"])
def test_half_precision_exports(tmp_path, kind, stored):
    """Near ties may fall to either side, and the router of a random mixture may send a token elsewhere.

    Random logits end near 8: so far behind would be a token that has nothing to do with the text.
    """
    model, dtype = make_model(kind), STORED_TYPES[stored]
    folder = export(model, kind, tmp_path / "folder", stored)
    theirs = ask(ENVIRONMENT, "vllm_greedy.py", str(folder), str(dtype).removeprefix("torch."))
    exact = rounded(model, dtype)
    same = sum(greedy(exact, prompt) == answer for prompt, answer in zip(prompts(), theirs, strict=True))
    behind = max(shortfall(exact, prompt, answer) for prompt, answer in zip(prompts(), theirs, strict=True))
    print(f"{kind} {stored}: {same} of {len(theirs)} answers equal, {behind:.3f} behind")
    assert behind < {"f16": 2, "bf16": 5}[stored]
