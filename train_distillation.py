"""White-box distillation: a small student learns from all that a large teacher thinks, not only from the right token.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531. A teacher that gives Lyon 5 % and bananas nothing says more about
Paris than the word Paris does. On every supervised token

    loss = CE + alpha * T^2 * KL(teacher || student),    both softmaxes of logits / T

T > 1 brings out what the teacher thinks unlikely; gradients of the KL shrink with 1 / T^2, which the T^2 undoes. Later
versions of MiniMind weigh a * CE + (1 - a) * KL: their --alpha a is --alpha (1 - a) / a here, their 0.5 our 1.

--kl reverse, KL(student || teacher): the student keeps to what the teacher finds likely instead of covering all of it
(Gu et al. 2023, https://arxiv.org/abs/2306.08543). --top_k N: the teacher's N likeliest tokens only, rescaled to sum
to 1. That is biased: the student learns that all other tokens are impossible, and is surer than its teacher.

    python train_distillation.py
    python train_distillation.py --data_path dataset/sample/sft.jsonl --dim 128 --n_layers 2 --out_dir out/quickstart \\
        --from_weight none --max_steps 400 --learning_rate 3e-3 --temperature 1
    python train_distillation.py --teacher_path ./MiniMind2      # any causal model of transformers with our tokenizer
    torchrun --nproc_per_node 2 train_distillation.py

reads   out/full_sft_{dim}[_moe].pth            the student; another start with --from_weight
        out/full_sft_{teacher_dim}[_moe].pth    the teacher; another one with --from_teacher_weight or --teacher_path
        dataset/sft_mini_512.jsonl              {"conversations": [{"role", "content"}, ...]} a line
writes  out/full_dist_{dim}[_moe].pth           weights: eval_model.py --weight full_dist talks to them
        out/checkpoints/, out/logs/             state for --resume; log (nll, kl, teacher_nll) and loss curve
"""

from argparse import SUPPRESS

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.flags import non_empty, parse_bool, plain_errors, real, whole
from common.tensor_files import digest
from dataset.readers import require_file
from model.chat_format import ChatFormat
from model.loading import count_parameters
from model.record import describe_file
from training.cli import stage_parser
from training.evaluation import Evaluation
from training.inputs import load_data, starting_model, starting_tokenizer
from training.loop import train
from training.losses import balance_loss, moe_metrics, supervised_forward, supervised_per_row, token_nll
from training.processes import distributed_run
from training.teacher import add_teacher_flags, freeze, load_teacher, settle_teacher, teacher_logits

QUESTIONS = ["你好，请介绍一下自己。", "世界上最高的山峰是什么？", "What is the capital of France?"]
CHUNK = 1024  # tokens whose float32 probabilities (26 MB a table, there are about six) exist at the same time


def token_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, direction: str = "forward", top_k: int = 0
) -> Tensor:
    """KL divergence of each token's two distributions over the vocabulary, (N,) float32, in nats, without the T^2.

    Args: student, teacher: (N, V) logits of any dtype; direction, top_k: see the head of this file, 0 takes all tokens.
    """
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = teacher.float() / temperature
    if top_k:
        log_p, tokens = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1)
        log_q = log_q.gather(-1, tokens)
    log_p = log_p.log_softmax(-1)
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def make_loss(teacher, alpha: float = 1.0, temperature: float = 1.5, direction: str = "forward", top_k: int = 0):
    """Distillation's loss_fn for the loop; its weight is the number of supervised tokens. See the head of this file."""

    def three_sums(logits: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
        """Sums over some tokens: CE, KL, and the teacher's own CE."""
        kl = token_kl(logits, taught, temperature, direction, top_k)
        return torch.stack([token_nll(logits, targets).sum(), kl.sum(), token_nll(taught, targets).sum()])

    def distillation_loss(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        taught = teacher_logits(teacher, batch)
        output = supervised_forward(model, batch)
        tables = (output.logits, taught, batch["targets"])
        # checkpoint: the backward pass computes a chunk's probabilities again; between the passes only logits are kept.
        nll, kl, teacher_nll = sum(
            checkpoint(three_sums, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*(table.split(CHUNK) for table in tables), strict=True)
        )
        aux = balance_loss(output.aux_loss, batch)
        loss = nll + alpha * temperature**2 * kl + aux
        weight = nll.new_full((), len(batch["targets"]))
        metrics = {"nll": nll, "kl": kl, "teacher_nll": teacher_nll}
        metrics |= moe_metrics(model, output, batch, supervised_per_row(batch))
        return loss, weight, {name: value.detach() for name, value in metrics.items()}

    return distillation_loss


def parse_args(argv=None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/sft_mini_512.jsonl",
        from_weight="full_sft",
        save_weight="full_dist",
        epochs=6,
        batch_size=32,
        learning_rate=5e-6,
        wandb_project="MiniMind-Distillation",
    )
    group = parser.add_argument_group("distillation (the model flags are the student's; the teacher's are read)")
    group.add_argument("--alpha", type=real(0, 1e4), default=1.0, help="weight of the KL; 0: cross-entropy alone")
    group.add_argument(
        "--temperature", type=real(0.01, 100), default=1.5, help="T that divides both models' logits in the KL"
    )
    group.add_argument("--kl", choices=("forward", "reverse"), default="forward", help="direction of the KL")
    group.add_argument(
        "--top_k", type=whole(0, 2**16), default=0, help="compare the teacher's likeliest tokens only; 0: all"
    )
    add_teacher_flags(group)
    group.add_argument(
        "--student_hidden_size", dest="dim", type=whole(1, 2**16), default=SUPPRESS, help="same as --dim"
    )
    group.add_argument(
        "--student_num_layers", dest="n_layers", type=whole(1, 1000), default=SUPPRESS, help="same as --n_layers"
    )
    group.add_argument(
        "--student_use_moe", dest="use_moe", type=parse_bool, default=SUPPRESS, metavar="BOOL", help="same as --use_moe"
    )
    group.add_argument(
        "--from_student_weight", dest="from_weight", type=non_empty, default=SUPPRESS, help="same as --from_weight"
    )
    parser.add_check(distillation_problems)
    return parser.parse_args(argv)


def distillation_problems(args) -> list[str]:
    """What is wrong between the flags of this stage."""
    problems = []
    if args.top_k and args.kl == "reverse":
        problems.append("--top_k with --kl reverse: outside the top k the teacher says 0, the reverse KL is infinite")
    return problems + settle_teacher(args)


def main(argv=None):
    args = parse_args(argv)
    with distributed_run(args) as run:
        with plain_errors():
            require_file(args.data_path, "chat")
            tokenizer = starting_tokenizer(args)
            student = starting_model(args, tokenizer)
            teacher = load_teacher(args, student.config.vocab_size, tokenizer)
            args.teacher_checksum = digest(teacher.state_dict())[:16]  # like a flag: --resume refuses another value
            taught_by = {**describe_file(args.teacher_weights), "checksum": args.teacher_checksum}
            teacher = freeze(teacher, run.dtype).to(run.device)
            data = load_data(run, args, ChatFormat(tokenizer), kind="chat")
        run.log(f"教师模型(LLM)总参数量：{count_parameters(teacher) / 1e6:.3f} 百万")
        loss_fn = make_loss(teacher, args.alpha, args.temperature, args.kl, args.top_k)
        train(run, args, student, data, loss_fn, Evaluation(data.heldout, tokenizer, QUESTIONS),
              facts={"teacher": taught_by}, trained_name="学生模型(LLM)总参数量")  # fmt: skip


if __name__ == "__main__":
    main()
