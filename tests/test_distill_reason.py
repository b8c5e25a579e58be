"""Reasoning distillation: which tokens are tags, the weighted loss, what the log says, and the score of the format."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from toy import toy_run
from transformers import PreTrainedTokenizerFast

from dataset.batching import Sequences
from dataset.token_cache import open_token_cache
from inference.scoring import follows_reasoning_format, parse_question, score_report
from model.chat_format import TAGS as ALL_TAGS
from model.chat_format import ChatFormat
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from train_distill_reason import TAGS, find_tags, make_loss
from training.evaluation import Evaluation
from training.losses import next_token_loss
from training.report import Meter

THINKING = "<think>\n3+8=11。\n</think>\n<answer>\n11支。\n</answer>"
ROWS = [
    [("user", "3支加8支？"), ("assistant", THINKING)],
    [("user", "<think> 是什么？ a < b"), ("assistant", "标签。<answer"), ("user", "算"), ("assistant", THINKING)],
    [("user", "写代码"), ("assistant", "if a < b and b > c: print(think, answer) # </p>")],
]


@pytest.fixture(scope="session")
def tagless_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """Our tokenizer without its tags, as MiniMind's of 2025-02: <think> is a few tokens of ordinary text."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in ALL_TAGS]
    tagless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>",
                                      eos_token="</s>", unk_token="<unk>")  # fmt: skip
    tagless.chat_template = tokenizer.chat_template
    return tagless


@pytest.fixture(params=["tags are tokens", "tags are texts"])
def setting(request, tokenizer, tagless_tokenizer, write_jsonl, tmp_path):
    """(sequences of ROWS, tokenizer, token ids of each tag), for both kinds of tokenizers."""
    chosen = tokenizer if request.param == "tags are tokens" else tagless_tokenizer
    lines = [{"conversations": [{"role": role, "content": text} for role, text in row]} for row in ROWS]
    cache = open_token_cache(write_jsonl(lines), "chat", ChatFormat(chosen), tmp_path / "cache", log=lambda _: None)
    tags = [chosen.encode(tag, add_special_tokens=False) for tag in TAGS]
    return Sequences.from_cache(cache, 512), chosen, tags


def small_model(seed: int = 0, **changes) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    return MiniMindForCausalLM(LMConfig(**{"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, **changes}))


def test_one_kind_of_tokenizer_has_the_tags_and_the_other_has_not(tokenizer, tagless_tokenizer):
    assert [len(tokenizer.encode(tag, add_special_tokens=False)) for tag in TAGS] == [1, 1, 1, 1]
    assert all(len(tagless_tokenizer.encode(tag, add_special_tokens=False)) >= 3 for tag in TAGS)


def test_exactly_the_tags_in_answers_are_found(setting):
    """Upstream R1, R2: there every "<", ">", "th", ... counted as a tag, in code and in what the user says too."""
    sequences, tokenizer, tags = setting
    batch = sequences.collate(np.arange(3))
    found = find_tags(batch, tags)
    width = batch["input_ids"].shape[1]
    for row, tags_in_row in enumerate((TAGS, TAGS, ())):
        mine = batch["positions"] // width == row
        marked = batch["targets"][mine & found].tolist()
        assert tokenizer.decode(marked).replace(" ", "") == "".join(tags_in_row)
        assert len(marked) == sum(map(len, tags)) * bool(tags_in_row)


def test_tags_are_found_wherever_rows_stand_in_the_batch(setting):
    sequences, _, tags = setting
    whole = find_tags(sequences.collate(np.array([2, 0, 1])), tags)
    alone = [find_tags(sequences.collate(np.array([i])), tags) for i in (2, 0, 1)]
    assert torch.equal(whole, torch.cat(alone)) and whole.any() and not whole.all()


def test_a_sequence_must_be_whole_consecutive_and_of_one_row():
    def found(targets: list, positions: list) -> list[int]:
        batch = {
            "input_ids": torch.zeros(2, 10),
            "targets": torch.tensor(targets),
            "positions": torch.tensor(positions),
        }
        return find_tags(batch, [[7, 8, 9]]).int().tolist()

    assert found([1, 7, 8, 9, 7, 8], [0, 1, 2, 3, 4, 5]) == [0, 1, 1, 1, 0, 0]
    assert found([7, 8, 9], [1, 2, 4]) == [0, 0, 0]  # something unsupervised stands between
    assert found([7, 8, 9], [8, 9, 10]) == [0, 0, 0]  # ends in the next row
    assert found([7, 8, 9, 7, 8, 9], [7, 8, 9, 10, 11, 12]) == [1] * 6
    assert found([7, 8], [1, 2]) == [0, 0] and found([], []) == []


@pytest.mark.parametrize("use_moe", [False, True])
def test_loss_is_the_weighted_mean_of_the_tokens(setting, use_moe):
    """Upstream R3 takes the divisor before the weights. Here against a loop over tokens, each row alone."""
    sequences, tokenizer, tags = setting
    model = small_model(use_moe=use_moe, aux_loss_alpha=0.1)
    loss, weight, metrics = make_loss(tags, 10.0)(model, sequences.collate(np.arange(3)))
    total = plain = divisor = aux = 0.0
    for i in range(3):
        batch = sequences.collate(np.array([i]))
        output = model(batch["input_ids"], lengths=batch["lengths"])
        logp = output.logits[0].double().log_softmax(-1)
        row_weight = 0.0
        for place, target, is_tag in zip(
            batch["positions"].tolist(), batch["targets"].tolist(), find_tags(batch, tags).tolist(), strict=True
        ):
            token_weight = 10.0 if is_tag else 1.0
            total -= token_weight * logp[place, target].item()
            plain -= logp[place, target].item()
            row_weight += token_weight
        divisor, aux = divisor + row_weight, aux + row_weight * output.aux_loss.item()
    assert weight.item() == divisor
    assert loss.item() == pytest.approx(total + aux, rel=1e-4) and (aux > 0) == use_moe
    assert metrics["nll"].item() == pytest.approx(plain, rel=1e-4)


def test_batch_composition_never_matters(setting):
    sequences, _, tags = setting

    def run(parts: list):
        model, sums = small_model(use_moe=True, aux_loss_alpha=0.1), []
        for ids in parts:
            loss, weight, metrics = make_loss(tags, 10.0)(model, sequences.collate(np.array(ids)))
            loss.backward()
            sums.append(torch.stack([loss.detach(), weight, metrics["nll"], metrics["expert_0"]]))
        return sum(sums), torch.cat([p.grad.flatten() for p in model.parameters()])

    for whole, parts in zip(run([[0, 1, 2]]), run([[2], [1, 0]]), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


def test_weight_1_is_the_loss_of_sft(setting):
    sequences, _, tags = setting
    batch = sequences.collate(np.arange(3))
    ours, plain = make_loss(tags, 1.0)(small_model(), batch), next_token_loss(small_model(), batch)
    torch.testing.assert_close(ours[:2], plain[:2])


def test_bits_per_byte_and_nll_count_every_token_once(setting):
    """The weights of the loss do not reach them: they are what SFT's loss would measure."""
    sequences, tokenizer, tags = setting
    evaluation, model = Evaluation(sequences, tokenizer), small_model()
    weighted = evaluation.measure(toy_run(), model, make_loss(tags, 10.0), 1024)
    plain = evaluation.measure(toy_run(), model, next_token_loss, 1024)
    for name in ("heldout_nll", "bits_per_byte"):
        assert weighted[name] == pytest.approx(plain[name], rel=1e-5)
    assert weighted["heldout_loss"] != pytest.approx(plain["heldout_loss"], rel=1e-5)
    assert plain["heldout_loss"] == pytest.approx(plain["heldout_nll"])


def test_the_log_divides_nll_by_tokens_and_the_loss_by_weights():
    meter = Meter()
    counts = {"weight": 12.0, "tokens": 9.0, "positions": 16.0, "targets": 3.0}
    meter.add({"loss": 30.0, "nll": 6.0, **counts, "stop": 0.0, "save": 0.0, "grad_norm": 1.0, "skipped": 0.0})
    means = meter.means()
    assert means["loss"] == 2.5 and means["nll"] == 2.0 and "targets" not in means


# The format


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        (THINKING, True),
        ("<think>想</think><answer>答</answer>", True),
        ("<think>\na\n\nb < c\n</think>\n<answer>\n第一行\n第二行\n</answer>\n", True),
        ("11支。", False),
        ("好的。" + THINKING, False),
        (THINKING + "还有", False),
        (THINKING.removesuffix("</answer>"), False),  # cut off
        (THINKING.replace("</think>", ""), False),
        ("<answer>答</answer><think>想</think>", False),
        ("<think>想<answer>答</answer></think>", False),
        ("<think>\n</think>\n<answer>\n答\n</answer>", False),
        ("<think>想</think>\n<answer>\n \n</answer>", False),
        ("<think>" + THINKING, False),
        (THINKING + THINKING, False),
    ],
)
def test_follows_reasoning_format(text, follows):
    assert follows_reasoning_format(text) is follows


def test_score_report_says_how_many_replies_follow_the_format():
    line = json.dumps({"conversations": [{"role": "user", "content": "3+8=？"}], "answer": "11支"})
    questions = [parse_question(line.encode())] * 3
    report = score_report(questions, [THINKING, "11支", "<think>11支"]).splitlines()
    assert report[-2:] == ["tags obeyed: 33.3 %", "held-out score: 100.0 %"]
    assert not any("tags" in line for line in score_report(questions, ["11支"] * 3).splitlines())


def test_obedience_is_measured_on_the_questions_of_held_out_rows(setting, monkeypatch):
    """The prompt is everything before the last answer; the checks see the reply as text."""
    sequences, tokenizer, tags = setting
    prompts = []

    def reply(model, asked, params, eos_token_id):
        prompts.extend(asked)
        assert params.temperature == 0 and not model.training
        return [tokenizer.encode(THINKING if i else "11", add_special_tokens=False) for i in range(len(asked))]

    monkeypatch.setattr("training.evaluation.generate", reply)
    evaluation = Evaluation(sequences, tokenizer, checks={"tag_obedience": follows_reasoning_format})
    model = small_model()
    measured = evaluation.measure(toy_run(), model, make_loss(tags, 10.0), 1024)
    assert measured["tag_obedience"] == pytest.approx(2 / 3) and model.training
    chat = ChatFormat(tokenizer)
    expected = [chat.encode_prompt([{"role": role, "content": text} for role, text in row[:-1]]) for row in ROWS]
    assert prompts == expected
    assert math.isfinite(measured["heldout_loss"])
