"""Write the sample corpus, dataset/sample/*.jsonl, from the fact tables in scripts/sample_data/.

    python scripts/make_sample_data.py --out_dir dataset/sample --seed 1337

The same seed writes the same bytes. dataset/sample/README_en.md says what each file holds.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from sample_data.corpus import (
    Asker,
    assistant,
    conversations,
    held_out_questions,
    pretraining_texts,
    questions,
    single_turns,
    split_questions,
    turns,
    unanswerable_questions,
    unknown_subjects,
    user,
)
from sample_data.medical import medical_facts
from sample_data.persona import persona_facts
from sample_data.preferences import preference_pairs
from sample_data.reasoning import problems, reasoned
from sample_data.schema import Relation
from sample_data.tables import all_facts, all_tables
from sample_data.unknown_questions import REFUSALS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.flags import BriefParser, non_empty, plain_errors, whole  # noqa: E402

PERSONA_REFUSALS = 120


def make_files(seed: int) -> dict[str, list[dict]]:
    """File name -> rows."""

    def rng(part: str) -> random.Random:
        # One generator per file: a change in one file leaves the others as they were.
        return random.Random(f"{seed}/{part}")

    facts = all_facts()
    unknown, unknown_heldout = unknown_subjects(
        [table for table in all_tables() if isinstance(table, Relation)], rng("unknown names")
    )
    heldout = held_out_questions(facts, rng("heldout"))
    unanswerable = unanswerable_questions(unknown_heldout, rng("unanswerable"))
    dpo, dpo_heldout = preference_pairs(300, 40, rng("dpo"))

    reasoning = problems(700, rng("reason"))
    solved, unsolved = reasoning[:600], reasoning[600:]

    persona, persona_heldout = single_turns(persona_facts(), 20, rng("persona"))
    # No file trains what another file's score asks, although several ask the model who it is.
    asked = {question for row in heldout for question in questions(row["conversations"])}
    persona = [row for row in persona if asked.isdisjoint(questions(row["conversations"]))]
    held_out = [row["conversations"][-1]["content"] for row in heldout + unanswerable + persona_heldout]
    held_out += [wording for fact in facts for wording in fact.unseen]
    sft = conversations(facts, unknown, Asker(held_out, rng("sft")), rng("sft rows"))
    trained = {question for messages in sft for question in questions(messages)}
    persona_heldout = [row for row in persona_heldout if trained.isdisjoint(questions(row["conversations"]))]
    # Every ordinary fact once and some refusals, so that the adapter learns who it is and forgets nothing else.
    ordinary, order = split_questions([fact for fact in facts if fact.category != "identity"]), rng("persona order")
    persona += [{"conversations": turns((fact, asked_ways[0][0]))} for fact, asked_ways in ordinary.items()]
    refused = [messages for messages in sft if len(messages) == 2 and messages[-1]["content"] in REFUSALS]
    persona += [{"conversations": messages} for messages in order.sample(refused, PERSONA_REFUSALS)]
    order.shuffle(persona)
    medical, medical_heldout = single_turns(medical_facts(), 40, rng("medical"))
    return {
        "pretrain.jsonl": [
            {"text": text} for text in pretraining_texts(facts, Asker(held_out, rng("asked")), rng("pretrain"))
        ],
        "sft.jsonl": [{"conversations": messages} for messages in sft],
        "heldout.jsonl": heldout,
        "unanswerable_heldout.jsonl": unanswerable,
        "dpo.jsonl": dpo,
        "dpo_heldout.jsonl": dpo_heldout,
        "reason.jsonl": [{"conversations": [user(p.question), assistant(reasoned(p))]} for p in solved],
        "reason_heldout.jsonl": [
            {"conversations": [user(p.question)], "answer": p.answer_key, "category": p.category} for p in unsolved
        ],
        "lora_identity.jsonl": persona,
        "lora_identity_heldout.jsonl": persona_heldout,
        "lora_medical.jsonl": medical,
        "lora_medical_heldout.jsonl": medical_heldout,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=non_empty, default="dataset/sample", help="where the files go")
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=1337, help="the committed files were made with 1337"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out_dir = Path(args.out_dir)
    with plain_errors():
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, rows in make_files(args.seed).items():
            path = out_dir / name
            text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{path}: {len(rows)} rows, {len(text.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
