"""Distillation: the KL against PyTorch's, its limits, what must not change the loss, and which teachers are taken."""

import math
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy import VOCAB, toy_model, toy_run, toy_sequences
from transformers import LlamaConfig, LlamaForCausalLM

import train_distillation
from model.LMConfig import LMConfig
from model.loading import save_weights, weights_path
from model.model import MiniMindForCausalLM
from train_distillation import make_loss, parse_args, token_kl
from training.losses import next_token_loss
from training.teacher import freeze, load_teacher, teacher_logits

SAMPLE = Path(__file__).resolve().parents[1] / "dataset" / "sample" / "sft.jsonl"


def sharp_model(seed: int, **changes) -> MiniMindForCausalLM:
    """A toy with weights so large that its distributions are far from uniform."""
    model = toy_model(seed, **changes)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture
def teacher() -> MiniMindForCausalLM:
    return freeze(sharp_model(1, dim=32, n_layers=3), torch.float32)


def two_tables(n: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(2, n, VOCAB, generator=generator))


# The KL


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_equals_pytorchs_in_both_directions(temperature):
    student, teacher = two_tables()
    log_q, log_p = (F.log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(token_kl(student, teacher, temperature).double(), forward, rtol=1e-4, atol=1e-5)
    ours = token_kl(student, teacher, temperature, "reverse").double()
    torch.testing.assert_close(ours, reverse, rtol=1e-4, atol=1e-5)
    assert (forward - reverse).abs().max() > 0.01  # the test can tell them apart


def test_kl_is_computed_in_float32_from_half_precision():
    student, teacher = (x.bfloat16() for x in two_tables())
    torch.testing.assert_close(token_kl(student, teacher), token_kl(student.float(), teacher.float()))
    assert token_kl(student, teacher).dtype == torch.float32


def test_gradient_is_the_difference_of_the_probabilities():
    """d KL / d student logits = (q - p) / T: with the T^2 of the loss its size does not depend on T."""
    student, teacher = two_tables()
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(token_kl(student, teacher, 2.0).sum(), student)
    torch.testing.assert_close(gradient, ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).detach() / 2)


def test_a_high_temperature_matches_centred_logits():
    """Hinton et al. section 2.1: T^2 * KL goes to the squared distance of the centred logits over 2 V."""
    student, teacher = two_tables()
    distance = (teacher - teacher.mean(-1, keepdim=True)) - (student - student.mean(-1, keepdim=True))
    expected = distance.square().sum(-1) / (2 * VOCAB)
    torch.testing.assert_close(200.0**2 * token_kl(student.double(), teacher, 200.0), expected, rtol=0.05, atol=0.05)


def test_top_k_rescales_the_teacher_and_keeps_the_whole_student():
    student, teacher = two_tables()
    for kl, student_row, teacher_row in zip(token_kl(student, teacher, top_k=3), student, teacher, strict=True):
        best = teacher_row.argsort(descending=True)[:3].tolist()
        total = sum(math.exp(teacher_row[i]) for i in best)
        log_q = student_row.double().log_softmax(-1)
        p = {i: math.exp(teacher_row[i]) / total for i in best}
        assert kl.item() == pytest.approx(sum(p[i] * (math.log(p[i]) - log_q[i].item()) for i in best), rel=1e-4)


def test_top_k_of_everything_is_no_top_k_and_top_1_is_cross_entropy():
    student, teacher = two_tables()
    torch.testing.assert_close(token_kl(student, teacher, top_k=VOCAB + 9), token_kl(student, teacher))
    labels = F.cross_entropy(student, teacher.argmax(-1), reduction="none")
    torch.testing.assert_close(token_kl(student, teacher, top_k=1), labels)


# The loss


@pytest.mark.parametrize("use_moe", [False, True])
def test_loss_is_ce_plus_alpha_t2_kl_plus_balance(use_moe, teacher):
    """Upstream W3 drops cross-entropy and balance loss; each answer alone here, against F.kl_div."""
    student, sequences, ids = sharp_model(0, use_moe=use_moe, aux_loss_alpha=0.1), toy_sequences(), np.array([3, 7, 11])
    loss_fn = make_loss(teacher, alpha=0.7, temperature=2.0)
    loss, weight, metrics = loss_fn(student, sequences.collate(ids))
    plain, _, parts = next_token_loss(student, sequences.collate(ids))
    kl = 0.0
    for i in ids:
        row = torch.from_numpy(sequences.tokens[sequences.starts[i] :][: sequences.lengths[i]].astype(np.int64))[None]
        with torch.no_grad():
            log_q, log_p = (F.log_softmax(m(row).logits[0] / 2.0, -1) for m in (student, teacher))
        kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    assert weight == sequences.lengths[ids].sum()
    assert metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert loss.item() == pytest.approx(plain.item() + 0.7 * 4 * kl, rel=1e-4)
    assert metrics["nll"].item() == pytest.approx(parts["nll"].item(), rel=1e-5)
    assert (parts.get("aux_loss", 0) > 0) == use_moe and metrics.get("aux_loss") == parts.get("aux_loss")


def gradient_of(loss: torch.Tensor, model) -> torch.Tensor:
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_batch_composition_padding_and_chunks_never_matter(kl, teacher, monkeypatch):
    """3 rows at once or one by one, more padding, and chunks of any size: the same sums and gradient."""

    def run(parts: list, extra_padding: int = 0, chunk: int = 1024):
        monkeypatch.setattr(train_distillation, "CHUNK", chunk)
        student, totals, total_loss = sharp_model(0), {}, 0.0
        for ids in parts:
            batch = toy_sequences().collate(np.array(ids))
            width = batch["input_ids"].shape[1]
            rows, columns = batch["positions"] // width, batch["positions"] % width
            batch["input_ids"] = F.pad(batch["input_ids"], (0, extra_padding), value=7)
            batch["positions"] = rows * (width + extra_padding) + columns
            loss, weight, metrics = make_loss(teacher, direction=kl)(student, batch)
            total_loss = total_loss + loss
            for name, value in {"weight": weight, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals, gradient_of(total_loss, student)

    totals, gradient = run([[3, 7, 11]])
    for other in (run([[7], [11, 3]]), run([[3, 7, 11]], extra_padding=16), run([[3, 7, 11]], chunk=5)):
        torch.testing.assert_close(other[0], totals, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(other[1], gradient, rtol=1e-3, atol=1e-3)


def test_a_student_equal_to_its_teacher_has_no_kl(teacher):
    student = sharp_model(1, dim=32, n_layers=3)
    loss_fn = make_loss(teacher, alpha=1.0)
    loss, _, metrics = loss_fn(student, toy_sequences().collate(np.arange(4)))
    assert metrics["kl"].item() == pytest.approx(0.0, abs=1e-3)
    assert loss.item() == pytest.approx(metrics["nll"].item()) == pytest.approx(metrics["teacher_nll"].item())


def test_alpha_0_is_the_cross_entropy_alone(teacher):
    batch = toy_sequences().collate(np.arange(4))
    results = []
    for loss_fn in (make_loss(teacher, alpha=0.0), next_token_loss):
        student = sharp_model(0)
        results.append(gradient_of(loss_fn(student, batch)[0], student))
    torch.testing.assert_close(*results)


def test_gradient_reaches_the_student_only(teacher):
    student = sharp_model(0)
    make_loss(teacher)(student, toy_sequences().collate(np.arange(4)))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())


def test_a_batch_without_supervised_tokens_gives_zero_and_no_nan(teacher):
    student, nothing = sharp_model(0), torch.zeros(0, dtype=torch.int64)
    batch = {**toy_sequences().collate(np.arange(3)), "positions": nothing, "targets": nothing}
    loss, weight, _ = make_loss(teacher)(student, batch)
    loss.backward()
    assert loss == 0 and weight == 0


def test_only_logits_are_kept_for_the_backward_pass(teacher):
    """No float32 table of probabilities survives the forward pass: the memory is the two models' logits."""
    student, sizes = sharp_model(0), []
    batch = toy_sequences().collate(np.arange(20))
    table = len(batch["targets"]) * VOCAB

    def note(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        make_loss(teacher)(student, batch)
    assert sum(size >= table for size in sizes) == 2


# The teacher


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_teacher_in_low_precision_says_what_autocast_would(use_moe):
    batch = toy_sequences().collate(np.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        expected = teacher_logits(sharp_model(2, use_moe=use_moe).eval(), batch)
        ours = teacher_logits(freeze(sharp_model(2, use_moe=use_moe), torch.bfloat16), batch)
    assert torch.equal(ours, expected)


def teacher_flags(tmp_path, *more: str) -> Namespace:
    return parse_args(["--out_dir", str(tmp_path), "--teacher_dim", "32", "--teacher_n_layers", "1", *more])


@pytest.mark.parametrize("use_moe", [False, True])
def test_teacher_is_read_from_its_stages_file(tmp_path, tokenizer, use_moe):
    config = LMConfig(dim=32, n_layers=1, use_moe=use_moe)
    saved = MiniMindForCausalLM(config)
    save_weights(saved.state_dict(), weights_path(tmp_path, "full_sft", config))
    loaded = load_teacher(teacher_flags(tmp_path, "--teacher_use_moe", str(use_moe)), 6400, tokenizer)
    assert torch.equal(loaded.model.norm.weight, saved.model.norm.weight)
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)


def test_a_missing_teacher_is_an_error_with_the_command_that_makes_it(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="python train_full_sft.py --dim 32"):
        load_teacher(teacher_flags(tmp_path), 6400, tokenizer)


def llama_directory(tmp_path, tokenizer, vocab_size: int = 6400) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **size))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return model.eval()


def test_any_transformers_model_with_our_tokenizer_can_teach(tmp_path, tokenizer):
    """A Llama's logits at the supervised positions are those of each row alone: padding never matters."""
    llama = llama_directory(tmp_path, tokenizer)
    teacher = load_teacher(teacher_flags(tmp_path, "--teacher_path", str(tmp_path)), 6400, tokenizer)
    loaded = freeze(teacher, torch.float32)
    sequences, ids = toy_sequences(), np.array([3, 7, 11])
    with torch.no_grad():
        rows = [sequences.tokens[sequences.starts[i] :][: sequences.lengths[i]].astype(np.int64) for i in ids]
        expected = torch.cat([llama(torch.from_numpy(row)[None]).logits[0] for row in rows])
    torch.testing.assert_close(teacher_logits(loaded, sequences.collate(ids)), expected, rtol=1e-4, atol=1e-5)


def test_another_vocabulary_is_an_error(tmp_path, tokenizer):
    """Upstream W6 cuts the teacher's logits to the student's vocabulary and compares what is left."""
    llama_directory(tmp_path / "wide", tokenizer, vocab_size=6464)
    with pytest.raises(ValueError, match="6464 wide.*train a teacher with the student's tokenizer"):
        load_teacher(teacher_flags(tmp_path, "--teacher_path", str(tmp_path / "wide")), 6400, tokenizer)
    llama_directory(tmp_path / "other", tokenizer)
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<tool_call>"', '"<tool_kall>"'))
    with pytest.raises(ValueError, match="knows 6399 of the student's 6400 tokens"):
        load_teacher(teacher_flags(tmp_path, "--teacher_path", str(tmp_path / "other")), 6400, tokenizer)


@pytest.mark.parametrize("kind", ["--from_teacher_weight", "--teacher_path"])
def test_a_run_is_not_continued_with_another_teacher(kind, tmp_path, tokenizer, capsys):
    """Same flags, same name of the file, other weights in it."""
    place = tmp_path / ("teacher.pth" if kind == "--from_teacher_weight" else "teacher")
    config = LMConfig(dim=16, n_layers=1)

    def write_teacher(seed: int) -> None:
        torch.manual_seed(seed)
        model = MiniMindForCausalLM(config)
        if place.suffix:
            save_weights(model.state_dict(), place)
        else:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)

    argv = f"--data_path {SAMPLE} --dim 16 --n_layers 1 --teacher_dim 16 --teacher_n_layers 1 --device cpu".split()
    argv += (
        f"--dtype float32 --from_weight none --batch_size 2 --max_seq_len 64 --heldout_share 0 {kind} {place}".split()
    )
    argv += f"--out_dir {tmp_path} --cache_dir {tmp_path} --max_steps 1 --threads 1 --resume auto".split()
    with patch("training.report.plot_log"), patch("training.evaluation.Evaluation.answers", return_value=[]):
        for seed in (1, 1):
            write_teacher(seed)
            train_distillation.main(argv)
        assert "already complete" in capsys.readouterr().out
        write_teacher(2)
        with pytest.raises(SystemExit):
            train_distillation.main(argv)
    error = capsys.readouterr().err
    assert "teacher_checksum: " in error and "different run" in error


# The flags


def test_later_upstream_names_are_aliases():
    args = parse_args(
        "--student_hidden_size 64 --student_num_layers 2 --student_use_moe 1 --from_student_weight pretrain "
        "--teacher_hidden_size 96 --teacher_num_layers 3 --teacher_use_moe 0 --alpha 0.5 --temperature 1.5".split()
    )
    assert (args.dim, args.n_layers, args.use_moe, args.from_weight) == (64, 2, True, "pretrain")
    assert (args.teacher_dim, args.teacher_n_layers, args.teacher_use_moe, args.alpha) == (96, 3, False, 0.5)
    defaults = parse_args([])
    assert (defaults.dim, defaults.n_layers, defaults.teacher_dim, defaults.teacher_n_layers) == (512, 8, 768, 16)
    assert (defaults.from_weight, defaults.from_teacher_weight) == ("full_sft", "full_sft")


@pytest.mark.parametrize(
    "argv", ["--alpha -1", "--temperature 0", "--top_k -3", "--top_k 5 --kl reverse", "--from_teacher_weight none"]
)
def test_impossible_flags_end_the_program(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(argv.split())
    assert error.value.code == 2 and argv.split()[0] in capsys.readouterr().err


def test_training_moves_the_student_towards_its_teacher(teacher):
    """A few steps of the loop's arithmetic: KL and loss fall."""
    student, run = sharp_model(0), toy_run()
    loss_fn, batch = make_loss(teacher), toy_sequences().collate(np.arange(8))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    kls = []
    for _ in range(12):
        with run.autocast():
            loss, weight, metrics = loss_fn(student, batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        kls.append((metrics["kl"] / weight).item())
    assert kls[-1] < 0.7 * kls[0]
