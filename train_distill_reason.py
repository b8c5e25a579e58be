"""Reasoning distillation: the model learns to think before it answers, from the written thoughts of a larger one.

DeepSeek-R1 2025, https://arxiv.org/abs/2501.12948, section 2.4: fine-tuning on such texts is all it takes. An answer is

    <think>
    the thoughts
    </think>
    <answer>
    the answer
    </answer>

and the loss is that of SFT, with --tag_weight instead of 1 for the tokens of the four tags: there are few of them, and
one that is forgotten spoils the whole answer. Only tags in the assistant's turns count, and the sum is divided by the
sum of the weights. At every evaluation the log shows tag_obedience, the share of answers to up to 32 held-out questions
that follow the format exactly.

The default learning rate is full SFT's: the tags are single tokens that the model has hardly seen before.

    python train_distill_reason.py
    python train_distill_reason.py --from_weight full_sft                   # without the DPO stage before
    python train_distill_reason.py --data_path dataset/sample/reason.jsonl \\
        --out_dir out/quickstart --from_weight full_sft --epochs 4 --learning_rate 1e-3     # after make quickstart
    torchrun --nproc_per_node 2 train_distill_reason.py

reads   out/rlhf_{dim}[_moe].pth       from --out_dir; another start with --from_weight
        dataset/r1_mix_1024.jsonl      {"conversations": [{"role", "content"}, ...]} a line, answers as above
                                       or with the thoughts apart, in "reasoning_content": the same tokens
writes  out/reason_{dim}[_moe].pth     weights: eval_model.py --model_mode 3 talks to them
        out/checkpoints/, out/logs/    state for --resume; log and loss curve
"""

import torch
from torch import Tensor

from common.flags import plain_errors, real
from dataset.readers import require_file
from inference.scoring import follows_reasoning_format
from model.chat_format import ChatFormat
from training.cli import stage_parser
from training.evaluation import Evaluation
from training.inputs import load_data, starting_model, starting_tokenizer
from training.loop import train
from training.losses import moe_metrics, supervised_forward, token_nll
from training.processes import distributed_run

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
QUESTIONS = [
    "小明有12支铅笔，送给同学5支，还剩多少支？",
    "Tom has 3 pens and gets 8 more. How many pens does Tom have now?",
]


def find_tags(batch: dict[str, Tensor], tags: list[list[int]]) -> Tensor:
    """(N,) bool: which targets belong to a whole tag, i.e. to one of these sequences of consecutive tokens of a row.

    Our tokenizer has a token for each tag. One without, as MiniMind's of early 2025, spells <think> as "<", "th",
    "ink", ">": a "<" by itself is no tag, and what the user says is no target at all.
    """
    targets, positions = batch["targets"], batch["positions"]  # in the order of rows and places
    rows = positions // batch["input_ids"].shape[1]
    found = torch.zeros_like(targets, dtype=torch.bool)
    for tag in tags:
        count, last = len(targets) - len(tag) + 1, len(tag) - 1
        if count > 0:
            starts = (positions[last:] - positions[:count] == last) & (rows[last:] == rows[:count])
            for i, token in enumerate(tag):
                starts = starts & (targets[i : i + count] == token)
            for i in range(len(tag)):
                found[i : i + count] |= starts
    return found


def make_loss(tags: list[list[int]], tag_weight: float):
    """The loss_fn for the loop; its weight is the sum of the tokens' weights. Args: tags: token ids of each tag."""

    def reasoning_loss(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        output = supervised_forward(model, batch)
        nll = token_nll(output.logits, batch["targets"])
        weights = torch.where(find_tags(batch, tags), tag_weight, 1.0)
        weight = weights.sum()
        rows, width = batch["input_ids"].shape
        row_weights = weights.new_zeros(rows * width).scatter(0, batch["positions"], weights).view(rows, width).sum(1)
        aux = (output.aux_loss * row_weights).sum()
        metrics = {"nll": nll.sum().detach(), **moe_metrics(model, output, batch, row_weights)}
        return (nll * weights).sum() + aux, weight, metrics

    return reasoning_loss


def parse_args(argv=None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/r1_mix_1024.jsonl",
        from_weight="rlhf",
        save_weight="reason",
        epochs=1,
        batch_size=8,
        learning_rate=5e-5,
        max_seq_len=1024,
        heldout_share=0.02,
        wandb_project="MiniMind-Reasoning",
    )
    parser.add_argument(
        "--tag_weight", type=real(0.01, 1e4), default=10.0, help="weight of a tag's tokens; others weigh 1"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with distributed_run(args) as run:
        with plain_errors():
            require_file(args.data_path, "chat")
            tokenizer = starting_tokenizer(args)
            model = starting_model(args, tokenizer)
            data = load_data(run, args, ChatFormat(tokenizer), kind="chat")
        tags = [tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS]
        evaluation = Evaluation(data.heldout, tokenizer, QUESTIONS, max_new_tokens=min(args.max_seq_len, 512),
                                checks={"tag_obedience": follows_reasoning_format})  # fmt: skip
        train(run, args, model, data, make_loss(tags, args.tag_weight), evaluation)


if __name__ == "__main__":
    main()
