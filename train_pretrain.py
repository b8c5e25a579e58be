"""Stage 1: pretraining. The model reads text and learns to predict the next token, everywhere.

Every token but the first of a text is a target; documents never see each other. This is where the model gets its
language and its knowledge; the later stages only teach it how to behave.
Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", equation 1.

    python train_pretrain.py
    python train_pretrain.py --data_path dataset/sample/pretrain.jsonl --dim 256 --n_layers 4 --epochs 5 \\
        --accumulation_steps 1 --learning_rate 2e-3
    torchrun --nproc_per_node 2 train_pretrain.py

reads   dataset/pretrain_hq.jsonl        {"text": "..."} a line
writes  out/pretrain_{dim}[_moe].pth     weights: train_full_sft.py goes on from them
        out/checkpoints/, out/logs/      state for --resume; log and loss curve
"""

from common.flags import plain_errors
from dataset.readers import require_file
from model.chat_format import ChatFormat
from training.cli import stage_parser
from training.evaluation import Evaluation
from training.inputs import load_data, starting_model, starting_tokenizer
from training.loop import train
from training.losses import next_token_loss
from training.processes import distributed_run

BEGINNINGS = ["世界上最高的山峰是", "水的化学式是", "The capital of France is"]


def parse_args(argv=None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/pretrain_hq.jsonl",
        save_weight="pretrain",
        epochs=1,
        batch_size=32,
        accumulation_steps=8,
        learning_rate=5e-4,
        wandb_project="MiniMind-Pretrain",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with distributed_run(args) as run:
        with plain_errors():
            require_file(args.data_path, "text")
            tokenizer = starting_tokenizer(args)
            model = starting_model(args, tokenizer)
            data = load_data(run, args, ChatFormat(tokenizer), kind="text")
        evaluation = Evaluation(data.heldout, tokenizer, BEGINNINGS, continue_text=True)
        train(run, args, model, data, next_token_loss, evaluation)


if __name__ == "__main__":
    main()
