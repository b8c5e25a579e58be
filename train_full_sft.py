"""Stage 2: supervised fine-tuning (SFT). The model that continues texts learns to answer.

The loss is pretraining's, on the assistant's tokens only: the first token of each answer up to and including its </s>.
What the user and the system say is read but not imitated. Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, step 1.

    python train_full_sft.py
    python train_full_sft.py --data_path dataset/sample/sft.jsonl --learning_rate 2e-3 \\
        --max_seq_len 256                                                       # after pretraining on the sample
    torchrun --nproc_per_node 2 train_full_sft.py

reads   out/pretrain_{dim}[_moe].pth     from --out_dir; another start with --from_weight
        dataset/sft_mini_512.jsonl       {"conversations": [{"role", "content"}, ...]} a line
writes  out/full_sft_{dim}[_moe].pth     weights: eval_model.py --model_mode 1 talks to them
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

QUESTIONS = ["你好，请介绍一下自己。", "世界上最高的山峰是什么？", "What is the capital of France?"]


def parse_args(argv=None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/sft_mini_512.jsonl",
        from_weight="pretrain",
        save_weight="full_sft",
        epochs=1,
        batch_size=32,
        learning_rate=5e-5,
        wandb_project="MiniMind-Full-SFT",
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
        train(run, args, model, data, next_token_loss, Evaluation(data.heldout, tokenizer, QUESTIONS))


if __name__ == "__main__":
    main()
