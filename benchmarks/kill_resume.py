"""Kill a run with SIGKILL at random moments and continue it, again and again: is the result the unbroken run's?

    python benchmarks/kill_resume.py --kills 30
    python benchmarks/kill_resume.py --kills 5 --stages train_pretrain.py --processes 1

For every stage and number of processes: one unbroken run, then the same run killed ``--kills`` times. The moments are
spread over the whole run, every third one inside a save. The final weights must be equal bit for bit. Several processes
are ranks on loopback. Prints one line per case; exit code 1 if any differs.
"""

import argparse
import multiprocessing
import os
import random
import runpy
import socket
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SIZE = ["--dim", "32", "--n_layers", "2", "--max_seq_len", "64", "--heldout_share", "0", "--eval_interval", "0"]
FLAGS = [*SIZE, "--device", "cpu", "--dtype", "float32", "--dropout", "0.1", "--threads", "1", "--batch_size", "4",
         "--accumulation_steps", "1", "--log_interval", "50", "--save_minutes", "0", "--num_workers", "1"]  # fmt: skip
STAGES = {
    "train_pretrain.py": ["--data_path", "dataset/sample/pretrain.jsonl"],
    "train_full_sft.py": ["--data_path", "dataset/sample/sft.jsonl", "--from_weight", "START"],
    "train_lora.py": ["--data_path", "dataset/sample/lora_identity.jsonl", "--epochs", "90", "--from_weight", "START"],
    "train_dpo.py": ["--data_path", "dataset/sample/dpo.jsonl", "--max_seq_len", "256", "--epochs", "90",
                     "--from_weight", "START"],
}  # fmt: skip


def launch(script: str, flags: list[str], out: Path, processes: int) -> list:
    """Start the ranks of a stage in the background, with what a launcher would set in their environment."""
    words = [*FLAGS, *STAGES[script], *flags, "--out_dir", str(out), "--cache_dir", str(out.parent / "cache")]
    words = [str(out.parent / "start_32.pth") if word == "START" else word for word in words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(processes):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        arguments = (script, words, environment, out.parent / "log.txt")
        ranks.append(multiprocessing.get_context("forkserver").Process(target=run_rank, args=arguments))
        ranks[-1].start()
    return ranks


def run_rank(script: str, words: list[str], environment: dict[str, str], log: Path) -> None:
    """One rank, in its own process: the stage's main."""
    os.chdir(ROOT)
    os.environ |= environment
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    runpy.run_path(str(ROOT / script))["main"](words)


def kill(ranks: list) -> None:
    """SIGKILL for all of them."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def run_whole(script: str, flags: list[str], out: Path, processes: int) -> None:
    """Run a stage to its end. Raises RuntimeError if it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    ranks = launch(script, flags, out, processes)
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"{script} failed: {(out.parent / 'log.txt').read_text()[-3000:]}")


def progress(out: Path) -> str:
    """The newest state's name: it changes with every save."""
    return max((path.name for path in out.glob("checkpoints/**/epoch_*.pt")), default="")


def run_with_kills(script: str, flags: list[str], out: Path, processes: int, kills: int, rng: random.Random) -> dict:
    """Run a stage to its end, killed ``kills`` times on the way.

    A kill comes a random time after the run has made a new save, so that it gets on; every third comes the moment that
    a temporary file is seen, which is inside a save.
    """
    done = inside_save = 0
    while True:
        before, ranks = progress(out), launch(script, [*flags, "--resume", "auto"], out, processes)
        deadline = None
        while any(rank.is_alive() for rank in ranks):
            is_saving = any(out.rglob(".*.tmp"))
            if deadline is None and progress(out) != before:
                deadline = time.monotonic() + rng.random()
            if done < kills and deadline and (is_saving if done % 3 == 2 else time.monotonic() > deadline):
                kill(ranks)
                done, inside_save = done + 1, inside_save + is_saving
                break
            time.sleep(0.0005 if done % 3 == 2 else 0.005)
        else:
            if not any(rank.exitcode for rank in ranks):
                return {"kills": done, "inside a save": inside_save}
            raise RuntimeError(f"{script} failed: {(out.parent / 'log.txt').read_text()[-3000:]}")


def same(a: Path, b: Path) -> bool:
    """Both folders hold the same weight file, bit for bit."""
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*.pth")) for folder in (a, b)]
    if names[0] != names[1] or not names[0]:
        return False
    left, right = (torch.load(folder / names[0][0], weights_only=True) for folder in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def all_same(
    stages: list[str], processes: list[int], kills: int, max_steps: int, save_interval: int, work: Path, seed: int = 0
) -> bool:
    """Whether every stage with every number of processes ends with the unbroken run's weights; prints each case."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    multiprocessing.set_forkserver_preload(
        ["training.loop", "matplotlib.figure"]
    )  # else each start imports for seconds
    rng, results = random.Random(seed), []
    flags = ["--max_steps", str(max_steps), "--save_interval", str(save_interval)]
    run_whole("train_pretrain.py", ["--max_steps", "5", "--save_weight", "start"], work / "start", 1)
    for script in stages:
        for count in processes:
            place = work / f"{script}-{count}"
            place.mkdir()
            (place / "start_32.pth").write_bytes((work / "start" / "start_32.pth").read_bytes())
            started = time.monotonic()
            run_whole(script, flags, place / "straight", count)
            done = run_with_kills(script, flags, place / "killed", count, kills, rng)
            results.append(same(place / "straight", place / "killed"))
            print(
                f"{script} {count} process(es): {done['kills']} kills, {done['inside a save']} inside a save, weights "
                f"{'bit-identical' if results[-1] else 'DIFFER'}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return all(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--save_interval", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        is_same = all_same(**{**vars(args), "work": Path(work)})
    raise SystemExit(0 if is_same else 1)


if __name__ == "__main__":
    main()
