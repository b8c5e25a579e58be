"""Stage 3: DPO. The model learns to prefer the chosen answer to the rejected one, without a reward model.

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7. The reward of an answer is beta times how much more
likely it has become than under the model that training started from (the reference); the loss wants the chosen answer's
reward to be the higher one. --loss_type ipo: Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17.

The log-probability of an answer is the sum over its tokens, as in the paper; a mean would make beta mean something else
for every length (--length_normalize True gives it, and then wants a beta some hundred times larger). The paper's is
0.1. IPO's is the mean by default, as its authors and TRL have it: 1 / (2 beta) nats per token is the margin at which
its pull ends, so that a sum would ask the more of a token the shorter the answer is. Answers that both conversations
share, before they part, count nowhere: they cancel out of the sum and would only dilute the mean. Words with which two
different answers begin alike do count, as in TRL.
The learning rate is a fraction of SFT's: DPO only reorders what the model can say already, and a larger one soon lowers
the likelihood of the chosen answers too: watch chosen_logp. 1e-5 is a fifth of what SFT takes by default; upstream's
1e-8, with a mean over 3,000 padded positions, changed next to nothing.

    python train_dpo.py
    python train_dpo.py --data_path dataset/sample/dpo.jsonl --out_dir out/quickstart \\
        --heldout_share 0.1                                                     # after make quickstart
    torchrun --nproc_per_node 2 train_dpo.py

reads   out/full_sft_{dim}[_moe].pth     from --out_dir; another start with --from_weight
        dataset/dpo.jsonl                {"chosen": [{"role", "content"}, ...], "rejected": [...]} a line
writes  out/rlhf_{dim}[_moe].pth         weights: eval_model.py --model_mode 2 talks to them
        out/checkpoints/, out/logs/      state for --resume; log and loss curve
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from common.flags import add_bool_flag, plain_errors, real
from dataset.readers import require_file
from model.chat_format import ChatFormat
from training.cli import stage_parser
from training.evaluation import Evaluation
from training.inputs import load_data, starting_model, starting_tokenizer
from training.loop import train
from training.losses import answer_logprobs, moe_metrics, supervised_forward, supervised_per_row
from training.processes import distributed_run
from training.reference import reference_logprobs

QUESTIONS = ["你好，请介绍一下自己。", "世界上最高的山峰是什么？", "What is the capital of France?"]


def preference_loss(margin: Tensor, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, (P,).

    Args:
        margin: (P,) log-ratio of the chosen answer minus log-ratio of the rejected one, policy against reference.
        beta: strength of the pull towards the reference: larger stays closer.
        loss_type: 'sigmoid' is -log sigmoid(beta * margin); 'ipo' is (margin - 1 / (2 beta))^2, whose pull ends at a
            finite margin.
        label_smoothing: probability that a pair's label is wrong; 'sigmoid' only ("conservative DPO").
    """
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    logits = beta * margin
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def make_loss(
    reference: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
):
    """DPO's loss_fn for the loop; its weight is the number of pairs.

    Args:
        reference: (pairs of the file, 2) log-probabilities of chosen and rejected answer under the reference.
        beta, loss_type, label_smoothing: see `preference_loss`.
        length_normalize: means over an answer's tokens instead of sums.
    """

    def dpo_loss(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        output = supervised_forward(model, batch)
        policy = answer_logprobs(output.logits, batch)  # (2P,), first all chosen
        ratio = policy - reference[batch["pairs"]].T.flatten()
        if length_normalize:
            ratio = ratio / supervised_per_row(batch)
        chosen, rejected = ratio.chunk(2)
        losses = preference_loss(chosen - rejected, beta, loss_type, label_smoothing)
        aux = output.aux_loss.sum() / 2  # a pair's is the mean of its two rows'
        chosen_logp, rejected_logp = policy.detach().chunk(2)
        metrics = {
            "reward_margin": beta * (chosen - rejected).sum(),
            "reward_accuracy": (chosen > rejected).sum(),
            "chosen_reward": beta * chosen.sum(),
            "rejected_reward": beta * rejected.sum(),
            "chosen_logp": chosen_logp.sum(),
            "rejected_logp": rejected_logp.sum(),
        }
        weight = policy.new_full((), len(batch["pairs"]))
        metrics |= moe_metrics(model, output, batch, torch.full_like(policy, 0.5))
        return losses.sum() + aux, weight, {name: value.detach() for name, value in metrics.items()}

    return dpo_loss


def parse_args(argv=None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/dpo.jsonl",
        from_weight="full_sft",
        save_weight="rlhf",
        epochs=2,
        batch_size=8,
        learning_rate=1e-5,
        max_seq_len=3000,
        heldout_share=0.02,
        wandb_project="MiniMind-RLHF-SFT",
    )
    group = parser.add_argument_group("preference (a sequence of the shared flags is a pair here)")
    group.add_argument(
        "--beta", type=real(1e-4, 1e4), default=0.1, help="pull towards the reference; larger stays closer to it"
    )
    group.add_argument("--loss_type", choices=("sigmoid", "ipo"), default="sigmoid", help="the paper's loss, or IPO's")
    group.add_argument(
        "--label_smoothing",
        type=real(0, 0.5, below=True),
        default=0.0,
        help="probability that a label is wrong (sigmoid), below 0.5",
    )
    add_bool_flag(
        group, "--length_normalize", default=None,
        help="mean instead of sum of an answer's log-probabilities; default: on for ipo, off for sigmoid",
    )  # fmt: skip
    parser.add_check(preference_problems)
    args = parser.parse_args(argv)
    if args.length_normalize is None:
        args.length_normalize = args.loss_type == "ipo"
    return args


def preference_problems(args) -> list[str]:
    """What is wrong between the flags of this stage."""
    if args.label_smoothing and args.loss_type == "ipo":
        return [f"--label_smoothing {args.label_smoothing}: must be 0 with --loss_type ipo"]
    return []


def main(argv=None):
    args = parse_args(argv)
    with distributed_run(args) as run:
        with plain_errors():
            require_file(args.data_path, "preference")
            tokenizer = starting_tokenizer(args)
            model = starting_model(args, tokenizer)
            data = load_data(run, args, ChatFormat(tokenizer), kind="preference")
            reference = reference_logprobs(run, model, data, args.cache_dir, args.max_seq_len)
        loss_fn = make_loss(reference, args.beta, args.loss_type, args.label_smoothing, args.length_normalize)
        train(run, args, model, data, loss_fn, Evaluation(data.heldout, tokenizer, QUESTIONS))


if __name__ == "__main__":
    main()
