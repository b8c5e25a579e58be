"""inference/generation.py on a random model of 10^4 parameters: caching, batching and streaming change no token."""

import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inference.batch import Batch
from inference.generation import generate, stream
from inference.requests import Request
from inference.sampling import SamplingParams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM

V, EOS, NO_EOS = 64, 2, -1
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
PROMPTS = [[1, 5, 9], [1, 7, 20, 33, 11, 8, 40, 41, 42], [1, 30], [1, 60, 61, 62, 63, 3]]


def make_model(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": V, "max_seq_len": 64}
    model = MiniMindForCausalLM(LMConfig(**{**sizes, **fields})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # sharper than a fresh model: near-ties would make tokens depend on rounding
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request) -> MiniMindForCausalLM:
    return make_model(use_moe=request.param)


def naive_greedy(model, prompt: list[int], count: int) -> list[int]:
    """The definition: no cache, no batch, the whole sequence again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_cached_equals_uncached(model):
    for prompt in PROMPTS:
        assert generate(model, [prompt], GREEDY, NO_EOS) == [naive_greedy(model, prompt, 12)]


def test_a_batch_equals_single(model):
    """Upstream G2: padding was attended to."""
    assert generate(model, PROMPTS, GREEDY, NO_EOS) == [generate(model, [p], GREEDY, NO_EOS)[0] for p in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 2, 4, 9])
def test_chunked_prefill_equals_whole(model, chunk):
    """Upstream G1: more than one token against a filled cache attended wrongly. Log-probabilities, not only tokens."""

    def logprobs(chunk_size: int) -> torch.Tensor:
        batch = Batch(model, len(PROMPTS), prefill_chunk=chunk_size)
        running = [batch.add(Request(prompt, GREEDY, top_logprobs=0)) for prompt in PROMPTS]
        while batch.running:
            batch.step()
        return torch.tensor([continuation.logprobs for continuation in running])

    torch.testing.assert_close(logprobs(chunk), logprobs(100), atol=1e-4, rtol=0)


def test_streaming_equals_generate(model):
    for params in (GREEDY, SamplingParams(12, temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)):
        for prompt in PROMPTS:
            assert list(stream(model, prompt, params, NO_EOS)) == generate(model, [prompt], params, NO_EOS)[0]


def test_seeds_make_answers_reproducible(model):
    """Upstream E4: a random seed for every prompt."""
    answers = [
        generate(model, PROMPTS, SamplingParams(12, temperature=1.0, top_p=1.0, seed=seed), NO_EOS)
        for seed in (5, 5, 6)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_repetition_penalty_in_a_batch_equals_single(model):
    params = SamplingParams(12, temperature=0, repetition_penalty=1.5)
    assert generate(model, PROMPTS, params, NO_EOS) == [generate(model, [p], params, NO_EOS)[0] for p in PROMPTS]
    strong = SamplingParams(12, temperature=0, repetition_penalty=100)
    for prompt, answer in zip(PROMPTS, generate(model, PROMPTS, strong, NO_EOS), strict=True):
        assert len(set(answer)) == len(answer) and not set(answer) & set(prompt)


def test_max_new_tokens_counts_new_tokens_only(model):
    """Upstream G3: it was the length of prompt and answer together."""
    prompt = [1] + [5] * 30
    assert len(generate(model, [prompt], SamplingParams(7, temperature=0), NO_EOS)[0]) == 7
    tokens = stream(model, prompt, SamplingParams(7, temperature=0), NO_EOS)
    assert len(list(tokens)) == 7 and tokens.finish_reason == "length"


@pytest.mark.parametrize(("length", "expected"), [(62, 2), (63, 1), (64, 0), (65, 0), (200, 0)])
def test_a_prompt_at_the_context_limit_is_never_echoed(model, length, expected):
    """Upstream G3: a prompt at or over the limit came back as the answer."""
    prompt = [1] + [5] * (length - 1)
    tokens = stream(model, prompt, GREEDY, NO_EOS)
    assert len(list(tokens)) == expected and tokens.finish_reason == "length"
    answers = generate(model, [PROMPTS[0], prompt], GREEDY, NO_EOS)  # beside a short one, which gets its twelve
    assert list(map(len, answers)) == [12, expected]
    assert answers[0] == naive_greedy(model, PROMPTS[0], 12)


def test_answers_end_before_the_end_of_sequence_token(model):
    expected = [naive_greedy(model, prompt, 12) for prompt in PROMPTS]
    eos = expected[0][4]
    expected = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in expected]
    assert generate(model, PROMPTS, GREEDY, eos) == expected
    tokens = stream(model, PROMPTS[0], GREEDY, eos)
    assert list(tokens) == expected[0] and tokens.finish_reason == "stop"
    assert next(tokens, None) is None


def test_any_causal_model_of_transformers_works():
    ours = make_model()
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=ours.config.intermediate_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(ours.state_dict())
    assert generate(llama, PROMPTS, GREEDY, NO_EOS) == generate(ours, PROMPTS, GREEDY, NO_EOS)
    batch = torch.tensor([PROMPTS[1]])
    theirs = llama.generate(batch, max_new_tokens=12, do_sample=False, eos_token_id=NO_EOS, pad_token_id=0)
    assert generate(ours, [PROMPTS[1]], GREEDY, NO_EOS)[0] == theirs[0, batch.shape[1] :].tolist()


def test_every_step_is_in_inference_mode_whatever_the_thread(model):
    """Upstream G7: inference mode covered the call that built the generator, not its steps."""
    modes = []
    hook = model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    tokens = stream(model, PROMPTS[0], GREEDY, NO_EOS)
    next(tokens)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    thread = threading.Thread(target=next, args=(tokens,))
    thread.start()
    thread.join()
    hook.remove()
    assert modes == [True] * 3  # the first step also reads the prompt


def test_two_streams_at_once_do_not_disturb_each_other(model):
    """Upstream G6: one shared output object mixed concurrent requests."""
    first, second = (stream(model, prompt, GREEDY, NO_EOS) for prompt in PROMPTS[:2])
    woven = [(next(first), next(second)) for _ in range(12)]
    assert [list(tokens) for tokens in zip(*woven, strict=True)] == [naive_greedy(model, p, 12) for p in PROMPTS[:2]]


def test_logits_are_computed_for_the_last_position_only(model):
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    generate(model, [PROMPTS[1]], SamplingParams(2, temperature=0), NO_EOS)
    hook.remove()
    assert shapes == [(1, 1, V)] * 3  # the prompt but for its last token, that token, the first new one


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        generate(make_model().train(), PROMPTS, GREEDY, EOS)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="no token"):
        generate(model, [[1], []], GREEDY, EOS)


def test_no_prompts_no_answers(model):
    assert generate(model, [], GREEDY, EOS) == []
