"""LoRA: teach a finished model one more thing - who it is, a profession - by training 5 % more weights.

Every weight of the model is frozen; beside each matrix two thin ones learn (model/model_lora.py). The loss is SFT's.
The file they make is small, and the model without it is exactly what it was: adapters can be changed while talking.
Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3.

    python train_lora.py
    python train_lora.py --lora_name lora_medical --data_path dataset/lora_medical.jsonl --epochs 3
    python train_lora.py --data_path dataset/sample/lora_identity.jsonl \\
        --out_dir out/quickstart --epochs 3 --learning_rate 3e-3 --heldout_share 0.05       # after make quickstart
    torchrun --nproc_per_node 2 train_lora.py

The held-out loss is measured before and after; with --general_data FILE, that of held-out rows of another file (what
the model was fine-tuned with, say) too: a model that learns something new should not forget the rest. That is why the
sample's persona comes with four times as many ordinary questions. The matrices move a weight by less than its own
gradient step would, so the learning rate is some ten times that of full fine-tuning (3e-3 for the model of
`make quickstart`).

reads   out/full_sft_{dim}[_moe].pth            from --out_dir; another stage or file with --from_weight
        dataset/lora_identity.jsonl             {"conversations": [{"role", "content"}, ...]} a line
writes  out/lora/{lora_name}_{dim}[_moe].pth    the adapter: eval_model.py --lora_name talks with it
        out/checkpoints/, out/logs/             state for --resume; log and loss curve
"""

from argparse import SUPPRESS

import torch

from common.flags import file_name, non_empty, one_of_these, plain_errors, problem, real, whole
from dataset.batching import tokens_per_batch
from dataset.readers import require_file
from model.chat_format import ChatFormat
from model.loading import count_parameters
from model.model_lora import LORA_TARGETS, apply_lora, lora_state_dict
from training.cli import stage_parser
from training.evaluation import Evaluation
from training.inputs import load_data, starting_model, starting_tokenizer
from training.loop import train
from training.losses import next_token_loss
from training.processes import distributed_run

QUESTIONS = ["你好，请介绍一下自己。", "你是谁？", "世界上最高的山峰是什么？"]
FEW = 30  # held-out rows below which a difference may be chance


def parse_args(argv=None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/lora_identity.jsonl",
        from_weight="full_sft",
        epochs=10,
        batch_size=16,
        learning_rate=1e-3,
        wandb_project="MiniMind-LoRA-SFT",
    )
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora_name", type=file_name, default="lora_identity", help="name of the adapter; its file is named after it"
    )
    group.add_argument("--lora_rank", type=whole(1, 2**16), default=16, help="width of the two matrices")
    group.add_argument(
        "--lora_alpha",
        type=real(1e-3, 1e6),
        default=None,
        help="strength: the update is scaled by alpha / rank; default: rank",
    )
    group.add_argument(
        "--lora_dropout", type=real(0, 1, below=True), default=0.0, help="dropout on the adapter's input"
    )
    group.add_argument(
        "--lora_targets", type=one_of_these(LORA_TARGETS), default=LORA_TARGETS, metavar="NAME,NAME,...",
        help="projections to adapt; q_proj,o_proj is what MiniMind adapts",
    )  # fmt: skip
    group.add_argument(
        "--general_data",
        type=non_empty,
        default=None,
        help="conversations; their held-out loss is measured before and after",
    )
    group.add_argument(
        "--save_weight", type=lambda name: problem(name, "name the adapter with --lora_name"), help=SUPPRESS
    )
    parser.add_check(lora_problems)
    args = parser.parse_args(argv)
    args.save_weight = f"lora/{args.lora_name}"
    return args


def lora_problems(args) -> list[str]:
    """What is wrong between the flags of this stage."""
    if args.lora_rank > args.dim:
        return [f"--lora_rank {args.lora_rank}: must be at most --dim ({args.dim}): a larger one adapts nothing more"]
    return []


def main(argv=None):
    args = parse_args(argv)
    with distributed_run(args) as run:
        with plain_errors():
            require_file(args.data_path, "chat")
            tokenizer = starting_tokenizer(args)
            chat = ChatFormat(tokenizer)
            model = starting_model(args, tokenizer, is_trained=False)
            total = count_parameters(model)
            base_dtype = None if run.dtype == torch.float32 else run.dtype
            apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets, base_dtype)
            data = load_data(run, args, chat, kind="chat")
            # The same share and seed: of the file that full SFT used, this holds out what full SFT held out.
            general = ()
            if args.general_data:
                general = load_data(run, args, chat, kind="chat", path=args.general_data).heldout
        trained = count_parameters(model) - total
        run.log(f"LLM总参数量：{total / 1e6:.3f} 百万 (不训练)")
        run.log(f"LoRA 参数占比：{trained / total:.2%}")
        model.to(run.device)

        def heldout_loss(part) -> float:
            budget = tokens_per_batch(args.batch_size, part.lengths)
            return Evaluation(part, tokenizer).measure(run, model, next_token_loss, budget)["heldout_loss"]

        parts = {"held-out loss": data.heldout, "general held-out loss": general}
        parts = {name: part for name, part in parts.items() if len(part)}
        before = {name: heldout_loss(part) for name, part in parts.items()}
        alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
        adapter = {"rank": args.lora_rank, "alpha": alpha, "targets": args.lora_targets}
        train(run, args, model, data, next_token_loss, Evaluation(data.heldout, tokenizer, QUESTIONS),
              weights=lora_state_dict, facts={"lora": adapter}, trained_name="LoRA 参数量")  # fmt: skip
        for name, part in parts.items():
            after = heldout_loss(part)
            remark = f", too few to tell much: raise --heldout_share {args.heldout_share}" if len(part) < FEW else ""
            run.log(
                f"{name}: {before[name]:.4f} before, {after:.4f} after, {after - before[name]:+.4f} nats per token "
                f"({len(part)} rows{remark})"
            )


if __name__ == "__main__":
    main()
