"""DPO: the loss against TRL's and a naive formula, what must not change it, its gradient, the cached reference."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version

import train_dpo
from common.tensor_files import digest
from dataset.batching import Pairs
from dataset.token_cache import open_token_cache
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from train_dpo import make_loss, preference_loss
from training.inputs import Data
from training.losses import answer_logprobs
from training.processes import Run
from training.reference import reference_logprobs

LOSSES = [
    {},
    {"beta": 0.5},
    {"label_smoothing": 0.1},
    {"length_normalize": True, "beta": 2.0},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "length_normalize": True},
]


def loss_flags(**changes) -> dict:
    return {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "length_normalize": False, **changes}


def small_model(use_moe: bool = False, seed: int = 0) -> MiniMindForCausalLM:
    """About 10^5 parameters, with weights large enough that answers differ."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, use_moe=use_moe))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def pair(question: str, chosen: str, rejected: str) -> dict:
    def talk(answer: str) -> list[dict]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    return {"chosen": talk(chosen), "rejected": talk(rejected)}


ROWS = [
    pair("你好", "你好！很高兴见到你。", "嗯。"),
    pair("一加一等于几？", "等于二。", "等于三，我也不知道，随便吧，这种问题有什么意思呢？"),
    pair("法国的首都是哪里？", "法国的首都是巴黎。", "是伦敦。"),
    pair("Say hi.", "Hi! How can I help you today, my friend?", "No."),
    pair("天空是什么颜色？", "蓝色。", "绿色。"),
]


@pytest.fixture
def pairs(write_jsonl, chat_format, tmp_path) -> Pairs:
    cache = open_token_cache(write_jsonl(ROWS), "preference", chat_format, tmp_path / "cache", log=lambda _: None)
    return Pairs.from_cache(cache, 512)


@torch.no_grad()
def naive_logprobs(model, pairs: Pairs, number: int) -> list[tuple[float, int]]:
    """(log-probability, tokens) of chosen and rejected answer of one pair: alone, unpadded, one token at a time."""
    result = []
    for row in (2 * number, 2 * number + 1):
        start, length = pairs.rows.starts[row], pairs.rows.lengths[row]
        tokens = pairs.rows.tokens[start : start + length + 1].astype(int).tolist()
        probabilities = model(torch.tensor([tokens])).logits[0].double().softmax(-1)
        first = pairs.rows.first_spans[row]
        total, count = 0.0, 0
        for begin, end in pairs.rows.spans[first : first + pairs.rows.span_counts[row]] - start:
            for place in range(begin, end):
                total += math.log(probabilities[place - 1, tokens[place]])
                count += 1
        result.append((total, count))
    return result


def trl_loss(policy, reference, counts, **flags) -> float:
    """TRL's own DPO loss, fed with these log-probabilities (2P,) of answers of so many tokens."""
    import trl

    if Version(trl.__version__) < Version("1.16"):
        pytest.skip("older versions of TRL compute the log-probabilities in the same function")
    flags = loss_flags(**flags)
    loss_type = flags["loss_type"]
    if flags["label_smoothing"]:
        loss_type = "aot"  # of one pair: -(1 - e) log sigmoid(h) - e log sigmoid(-h); TRL's sigmoid takes no smoothing
    elif loss_type == "sigmoid" and flags["length_normalize"]:
        loss_type = "sigmoid_norm"
    width = int(counts.max()) + 1
    mask = (torch.arange(width) > 0) & (torch.arange(width) <= counts[:, None])  # TRL drops the first position
    per_token = torch.where(mask, (policy / counts)[:, None], 0.0)[:, 1:]
    half = len(policy) // 2
    extra = {name: torch.zeros(len(policy), width - 1) for name in ("entropy", "mean_logits")}
    extra["is_top1"] = torch.zeros(len(policy), width - 1, dtype=torch.bool)
    outputs = SimpleNamespace(log_probs=per_token, aux_loss=None, **extra)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=flags["beta"], label_smoothing=flags["label_smoothing"], use_weighting=False, _total_train_tokens=0,
        _metrics={"eval": {}},
    )  # fmt: skip
    trainer._metrics["eval"] = {name: [] for name in (
        "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected",
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")}  # fmt: skip
    inputs = {"input_ids": torch.zeros(len(policy), width, dtype=torch.long), "completion_mask": mask.long(),
              "ref_chosen_logps": reference[:half], "ref_rejected_logps": reference[half:]}  # fmt: skip
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


@pytest.mark.parametrize("flags", [f for f in LOSSES if f != {"loss_type": "ipo"}], ids=str)
def test_loss_equals_trls_on_the_same_log_probabilities(flags):
    """TRL's IPO is the length-normalised one; without normalisation the formula below is the reference."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        policy, reference = -50 * torch.rand(2, 2, generator=generator)  # one pair, so that TRL's mean is over one
        counts = torch.randint(1, 30, (2,), generator=generator)
        ratio = policy - reference
        if flags.get("length_normalize"):
            ratio = ratio / counts
        f = loss_flags(**flags)
        ours = preference_loss(ratio[:1] - ratio[1:], f["beta"], f["loss_type"], f["label_smoothing"]).mean()
        torch.testing.assert_close(ours, trl_loss(policy, reference, counts, **flags))


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("flags", LOSSES, ids=str)
def test_loss_equals_the_naive_formula(flags, use_moe, pairs):
    """One token at a time in float64, each answer alone and unpadded; upstream A6 (off by one), A7 (mean), P1."""
    policy, reference = small_model(use_moe, 0).eval(), small_model(use_moe, 1).eval()
    f, expected = loss_flags(**flags), []
    table = torch.zeros(len(ROWS), 2)
    for i in range(len(ROWS)):
        (chosen, n), (rejected, m) = naive_logprobs(policy, pairs, i)
        (ref_chosen, _), (ref_rejected, _) = naive_logprobs(reference, pairs, i)
        table[i] = torch.tensor([ref_chosen, ref_rejected])
        n, m = (n, m) if f["length_normalize"] else (1, 1)
        h = (chosen - ref_chosen) / n - (rejected - ref_rejected) / m
        if f["loss_type"] == "ipo":
            expected.append((h - 1 / (2 * f["beta"])) ** 2)
        else:
            p, smoothing = 1 / (1 + math.exp(-f["beta"] * h)), f["label_smoothing"]
            expected.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p))
    loss, weight, metrics = make_loss(table, **f)(policy, pairs.collate(np.arange(len(ROWS))))
    assert weight == len(ROWS)
    assert (loss - metrics.get("aux_loss", 0.0)).item() == pytest.approx(sum(expected), rel=1e-4)
    assert (metrics.get("aux_loss", 0.0) > 0) == use_moe, "upstream P1: the MoE's balance loss was ignored"


def test_policy_equal_to_reference_gives_log_2(pairs):
    model = small_model().eval()
    batch = pairs.collate(np.arange(len(ROWS)))
    with torch.no_grad():
        output = model(batch["input_ids"], lengths=batch["lengths"], supervised=batch["positions"])
    table = answer_logprobs(output.logits, batch).view(2, -1).T
    loss, weight, metrics = make_loss(table)(model, batch)
    assert (loss / weight).item() == pytest.approx(math.log(2))
    assert metrics["reward_margin"] == metrics["chosen_reward"] == metrics["rejected_reward"] == 0
    assert metrics["chosen_logp"].item() == pytest.approx(table[:, 0].sum().item())


@pytest.mark.parametrize("use_moe", [False, True])
def test_batch_composition_and_padding_never_matter(use_moe, pairs):
    """5 pairs at once, 2+3, one by one, and with more padding: the same sums and gradient (upstream A3, A7)."""
    table = torch.randn(len(ROWS), 2) - 30

    def run(parts: list, extra_padding: int = 0):
        model = small_model(use_moe)
        totals, weights = {}, 0.0
        for ids in parts:
            batch = pairs.collate(np.array(ids))
            rows, width = batch["input_ids"].shape
            row, column = batch["positions"] // width, batch["positions"] % width
            batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, extra_padding), value=7)
            batch["positions"] = row * (width + extra_padding) + column
            loss, weight, metrics = make_loss(table)(model, batch)
            loss.backward()
            weights += weight
            for name in {"loss", *metrics} - {"expert_entropy", "expert_min"}:  # these two are of a micro-batch
                value = {"loss": loss.detach(), **metrics}[name]
                totals[name] = totals.get(name, 0.0) + value
        return totals, weights, torch.cat([p.grad.flatten() for p in model.parameters()])

    totals, weight, gradient = run([[0, 1, 2, 3, 4]])
    for parts, padding in (([[3, 0], [4, 1, 2]], 0), ([[4], [3], [2], [1], [0]], 0), ([[0, 1, 2, 3, 4]], 40)):
        other_totals, other_weight, other_gradient = run(parts, padding)
        assert other_weight == weight
        torch.testing.assert_close(other_totals, totals, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-4)


def test_gradient_raises_the_chosen_and_lowers_the_rejected(pairs):
    """A few steps on the loss: margin and accuracy grow, and the loss falls below log 2."""
    model = small_model()
    batch = pairs.collate(np.arange(len(ROWS)))
    with torch.no_grad():
        output = model(batch["input_ids"], supervised=batch["positions"])
        loss_fn = make_loss(answer_logprobs(output.logits, batch).view(2, -1).T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(10):
        loss, weight, metrics = loss_fn(model, batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss / weight < math.log(2)
    assert metrics["reward_accuracy"] == weight and metrics["reward_margin"] > 0


def test_logprob_gradient_equals_log_softmax():
    torch.manual_seed(0)
    batch = {"input_ids": torch.zeros(2, 4), "positions": torch.tensor([1, 2, 7]), "targets": torch.tensor([3, 0, 5])}
    logits = torch.randn(3, 6, requires_grad=True)
    ours = answer_logprobs(logits, batch)
    logp = logits.log_softmax(-1)[torch.arange(3), batch["targets"]]
    expected = torch.stack([logp[0] + logp[1], logp[2]])
    torch.testing.assert_close(ours, expected)
    weights = torch.tensor([2.0, -3.0])
    gradients = [torch.autograd.grad((y * weights).sum(), logits)[0] for y in (ours, expected)]
    torch.testing.assert_close(*gradients)


# The reference


def reference_in(tmp_path, model, data, max_seq_len: int = 512) -> torch.Tensor:
    run = Run(torch.device("cpu"), torch.float32)
    return reference_logprobs(run, model, data, str(tmp_path / "references"), max_seq_len)


def test_reference_is_computed_once_for_every_pair_and_found_again(pairs, tmp_path, monkeypatch):
    model = small_model(seed=2).eval()
    data = Data(*pairs.split(0.4, seed=1), "fingerprint")
    table = reference_in(tmp_path, model, data)
    for i in range(len(ROWS)):
        expected = [logp for logp, _ in naive_logprobs(model, pairs, i)]
        torch.testing.assert_close(table[i], torch.tensor(expected), rtol=1e-4, atol=1e-4)

    calls = []
    monkeypatch.setattr(MiniMindForCausalLM, "forward", lambda *a, **k: calls.append(1))
    other_split = Data(*pairs.split(0.2, seed=7), "fingerprint")
    assert torch.equal(reference_in(tmp_path, model, other_split), table) and not calls


def test_reference_of_other_weights_data_or_lengths_is_another(pairs, tmp_path):
    files = tmp_path / "references"
    data = Data(*pairs.split(0.4, seed=1), "fingerprint")
    first = reference_in(tmp_path, small_model(seed=2), data)
    second = reference_in(tmp_path, small_model(seed=3), data)
    assert not torch.equal(first, second) and len(list(files.iterdir())) == 2
    reference_in(tmp_path, small_model(seed=2), Data(data.train, data.heldout, "other data"))
    reference_in(tmp_path, small_model(seed=2), data, max_seq_len=100)
    assert len(list(files.iterdir())) == 4


def test_a_damaged_reference_is_computed_again(pairs, tmp_path, capsys):
    data = Data(*pairs.split(0.0, seed=1), "fingerprint")
    table = reference_in(tmp_path, small_model(), data)
    (file,) = (tmp_path / "references").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(reference_in(tmp_path, small_model(), data), table)
    assert "cannot be read" in capsys.readouterr().out
    for other in ({"a": table}, table[1:], table.double()):
        torch.save(other, file)
        assert torch.equal(reference_in(tmp_path, small_model(), data), table)
        assert "holds something else" in capsys.readouterr().out


def test_the_weights_fingerprint_ignores_nothing(pairs):
    """One changed weight, or one changed setting, is another reference."""
    model = small_model()
    first = digest(model.state_dict(), "settings")
    assert digest(small_model().state_dict(), "settings") == first != digest(model.state_dict(), "others")
    model.model.norm.weight.data[3] += 1e-3
    assert digest(model.state_dict(), "settings") != first


# The stage


def test_the_mean_is_ipos_default():
    """Of IPO's authors and of TRL; DPO's paper has the sum."""
    assert train_dpo.parse_args([]).length_normalize is False
    assert train_dpo.parse_args(["--loss_type", "ipo"]).length_normalize is True
    assert train_dpo.parse_args(["--loss_type", "ipo", "--length_normalize", "False"]).length_normalize is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "--beta 0: must be a number from 0.0001"),
        (["--label_smoothing", "0.5"], "--label_smoothing 0.5: must be a number from 0 to below 0.5"),
        (["--loss_type", "ipo", "--label_smoothing", "0.1"], "0 with --loss_type ipo"),
    ],
)
def test_impossible_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        train_dpo.parse_args(flags)
    assert message in capsys.readouterr().err


def test_a_full_disk_is_found_before_the_reference_pass_and_loses_none(pairs, tmp_path, monkeypatch):
    data, model = Data(*pairs.split(0.4, seed=0), "data"), small_model()
    table = reference_in(tmp_path, model, data)
    full = OSError(28, "No space left on device")

    def saves(*outcomes):
        effects = iter(outcomes)

        def save(value, path):
            if error := next(effects):
                raise error
            path.write_bytes(b"")

        return save

    other = Data(data.train, data.heldout, "other data")
    monkeypatch.setattr("training.reference.atomic_save", saves(None, full))
    assert torch.equal(reference_in(tmp_path, model, other), table), "it was full only at the end"
    monkeypatch.setattr("training.reference.atomic_save", saves(full))
    monkeypatch.setattr("training.reference.fill_logprobs", lambda *args: pytest.fail("worked for nothing"))
    with pytest.raises(OSError, match="No space left on device. Make room, or point --cache_dir elsewhere"):
        reference_in(tmp_path, model, other)
