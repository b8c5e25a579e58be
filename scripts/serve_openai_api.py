"""A server with OpenAI's interface: every program that can talk to ChatGPT can talk to your model.

    python scripts/serve_openai_api.py                                      # out/full_sft_*.pth on port 8998
    python scripts/serve_openai_api.py --port 9000 --api_key my-key         # another port; whoever asks needs the key
    python scripts/serve_openai_api.py --load 1 ./MiniMind2                 # a directory in the format of transformers
    python scripts/chat_openai_api.py                                       # talk to it, from another terminal

Reads the weights that eval_model.py would read, and every adapter in `{out_dir}/lora` that fits them; writes nothing.
The model is called "minimind", and with an adapter "minimind:lora_medical". docs/server.md lists the endpoints and says
how to connect Open WebUI, Dify and others. Ctrl-C or SIGTERM: running answers are finished, then it ends.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.flags import BriefParser, add_bool_flag, non_empty, plain_errors, real, whole  # noqa: E402
from inference.flags import add_choice_flags, add_sampling_flags, sampling_params, settle_choice  # noqa: E402

KEY_VARIABLE = "MINIMIND_API_KEY"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked; adds `params` (SamplingParams) and `choice` (Choice)."""
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=settle)
    add_choice_flags(parser.add_argument_group("model", "sizes are read from the weights, so seldom needed"))
    add_sampling_flags(parser.add_argument_group("sampling", "for what a request leaves open"))
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", type=non_empty, default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in: then set a key (%(default)s)",
    )  # fmt: skip
    group.add_argument("--port", type=whole(0, 65535), default=8998, help="0 takes a free one (%(default)s)")
    group.add_argument(
        "--api_key", type=non_empty, default=os.environ.get(KEY_VARIABLE),
        help=f"what clients must send; other users see flags, so better the environment variable {KEY_VARIABLE}",
    )  # fmt: skip
    group.add_argument(
        "--model_name", type=non_empty, default="minimind", help="what clients call the model (%(default)s)"
    )
    group.add_argument(
        "--cors_origins", nargs="+", default=[], metavar="URL", help='web pages that may use it, or "*" for all (none)'
    )
    group.add_argument(
        "--max_rows", type=whole(1, 1024), default=32, help="answers that are made at once (%(default)s)"
    )
    group.add_argument(
        "--max_queue", type=whole(1, 10**6), default=256, help="requests that may wait; more get 503 (%(default)s)"
    )
    group.add_argument(
        "--max_body", type=whole(1024, 2**30), default=2**20, help="bytes of a request; more get 413 (%(default)s)"
    )
    group.add_argument(
        "--request_timeout", type=real(0.1, 10**6), default=600, help="seconds an answer may take (%(default)s)"
    )
    group.add_argument(
        "--shutdown_timeout", type=whole(0, 10**6), default=30,
        help="seconds that running answers have when the server is told to end (%(default)s)",
    )  # fmt: skip
    add_bool_flag(group, "--raw_reasoning", default=False, help="leave <think> in the content (%(default)s)")
    add_bool_flag(
        group, "--drop_old_turns", default=False,
        help="forget the oldest turns of a dialogue that is too long, instead of answering 400 (%(default)s)",
    )  # fmt: skip
    add_bool_flag(group, "--log_prompts", default=False, help="write prompts and answers into the log (%(default)s)")
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> list[str]:
    """Work out what several flags say together; returns every problem."""
    if args.max_new_tokens is None:
        args.max_new_tokens = 1024
    if args.temperature is None:
        args.temperature = 0.85
    problems = settle_choice(args)
    try:
        args.params = sampling_params(args)
    except ValueError as error:
        problems.append(str(error))
    if ":" in args.model_name:
        problems.append(f"--model_name {args.model_name}: the part after a colon names an adapter, so it has none")
    return problems


def serve(args: argparse.Namespace) -> None:
    """Load, listen, answer. Raises ValueError and OSError for what is wrong with files, flags or the address."""
    from inference.models import load_choice
    from inference.server.app import make_app
    from inference.server.opening import open_engine
    from inference.server.service import Service, Settings
    from inference.server.serving import announce, listen, run

    socket = listen(args.host, args.port)  # first: a port that is taken shows before the model is loaded
    model, tokenizer = load_choice(args.choice, args.device, args.dtype)
    engine, adapter = open_engine(
        model, tokenizer, args.choice, args.lora_name, max_rows=args.max_rows, max_queue=args.max_queue
    )
    settings = Settings(
        name=args.model_name,
        adapter=adapter,
        continue_text=args.choice.continue_text,
        params=args.params,
        request_timeout=args.request_timeout,
        raw_reasoning=args.raw_reasoning,
        drop_old_turns=args.drop_old_turns,
        log_prompts=args.log_prompts,
    )
    service = Service(engine, model, tokenizer, settings)
    app = make_app(service, api_key=args.api_key, cors_origins=tuple(args.cors_origins), max_body=args.max_body)
    announce(socket, service, has_key=bool(args.api_key))
    run(app, engine, socket, args.shutdown_timeout)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with plain_errors():
        for remark in args.choice.remarks:
            print(remark, file=sys.stderr)
        serve(args)


if __name__ == "__main__":
    main()
