"""The training loop: one optimizer update ("step") per window of micro-batches. Every stage runs this function.

A step's gradient is the gradient of the mean over all supervised tokens of that step - of all its micro-batches, on
all ranks: every micro-batch adds the gradient of a *sum*, one all-reduce adds up the ranks, and one division follows.
So 8x1, 4x2 and 3+3+2 micro-batches, or one process and two, make the same update.

The host never waits for the device inside a step: it reads a step's numbers while the device already works on the next.
"""

import contextlib
import math
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dataset.batching import plan_batches, prefetch
from model.loading import count_parameters

from .checkpoint import Progress, Saver
from .cli import plain_errors
from .evaluation import Evaluation
from .inputs import Data
from .optim import clip_and_step, lr_at, make_optimizer, set_lr
from .report import Meter, Report, start_wandb
from .runtime import Run, stop_on_signals

MAX_BAD_STEPS = 5


def train(
    run: Run, args, model: nn.Module, data: Data, loss_fn, evaluation: Evaluation, *, weights=nn.Module.state_dict
) -> None:
    """Train ``model`` on ``data`` as the flags in ``args`` say; write weights, states to resume from, and the log.

    Args:
        data: training.data.Data: units with ``lengths`` and ``collate(ids) -> micro-batch``, and a fingerprint.
        loss_fn: (model, micro-batch) -> (loss sum, weight, metric sums); dividing by the weight gives the mean.
        weights: model -> the state dict that is saved for people (LoRA saves less than everything).
    Raises: SystemExit after saving: with 128 + n when signal n stopped the run, with a message after MAX_BAD_STEPS
        non-finite steps in a row (they have changed nothing, the weights before them are saved).
    """
    budget = tokens_per_batch(args.batch_size, data.train.lengths)
    plans = [plan_batches(data.train.lengths, budget, args.seed, epoch) for epoch in range(args.epochs)]
    window = args.accumulation_steps * run.world_size
    epoch_steps = [math.ceil(len(plan) / window) for plan in plans]
    total_steps = min(sum(epoch_steps), args.max_steps or sum(epoch_steps))

    model.to(run.device).train()
    run.broadcast(model)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    scaler, progress, meter = run.make_scaler(), Progress(), Meter()
    saver = Saver(run, args, model, optimizer, scaler, progress, weights, data.fingerprint)
    if args.resume:
        with plain_errors():
            saver.resume()
    wandb = start_wandb(run, args, saver.run_name) if args.use_wandb else None
    report = Report(run, args, saver.run_name, total_steps, progress.step, wandb)
    report.line(f"LLM总参数量：{count_parameters(model) / 1e6:.3f} 百万")
    report.line(
        f"{run.device.type}, {str(run.dtype).removeprefix('torch.')}: {len(data.train)} sequences, {total_steps} steps "
        f"of {args.accumulation_steps} micro-batches x {run.world_size} processes x {budget} tokens"
    )
    compiled = run.compile(model, args.use_compile)
    unread, stopping = None, False  # numbers of the last step, still on the device

    def read_numbers() -> dict[str, float]:
        """Fetch the last step's numbers from the device, count them, and give up when steps keep failing."""
        nonlocal unread
        if unread is None:
            return {}
        numbers, unread = meter.add(unread.tolist()), None
        progress.count(numbers)
        if numbers["skipped"]:
            report.line(f"step {progress.step}: non-finite gradient, update skipped ({progress.skipped} so far)")
        if progress.bad_streak >= MAX_BAD_STEPS:
            saver.save()
            saver.close()
            raise SystemExit(
                f"{MAX_BAD_STEPS} steps in a row had a non-finite gradient and changed nothing; the weights before "
                f"them are in {saver.weights_path}. Lower --learning_rate {args.learning_rate} or use --dtype float32."
            )
        return numbers

    if progress.step == total_steps:
        run.log("this run is already complete")
        return
    with stop_on_signals(run):
        for micro_batches in steps_left(run, data.train.collate, plans, window, progress, meter, args.num_workers):
            lr = lr_at(progress.step, total_steps, args.learning_rate, args.warmup_iters, args.lr_schedule)
            set_lr(optimizer, lr)
            names, sums = add_gradients(run, compiled, loss_fn, micro_batches, scaler, scale=1 / budget)
            if not meter.names:
                meter.names = [*run.from_main(names), "stop", "save", "grad_norm", "skipped"]
            if not names:
                sums = torch.zeros(len(meter.names) - 4, device=run.device)
            wishes = torch.tensor([float(bool(run.stop_signal)), float(saver.is_time())], device=run.device)
            sums = run.sum_gradients(model, torch.cat([sums, wishes]))
            weight = sums[1].clamp(min=1)  # a step without anything supervised has gradient 0, not 0 / 0
            norm, skipped = clip_and_step(optimizer, scaler, budget / weight, args.grad_clip)

            numbers = read_numbers()  # of the step before: they have arrived, nobody waits
            unread = torch.cat([sums, norm[None], skipped[None]])
            progress.step += 1
            report.step_done()
            stopping = bool(numbers.get("stop"))
            if progress.step % args.log_interval == 0 or progress.step == total_steps:
                read_numbers()
                report.log_step(progress, meter, lr, epoch_steps, total_steps)
            if is_due(progress.step, args.eval_interval) or progress.step == total_steps:
                read_numbers()
                with meter.paused():
                    evaluate(run, model, compiled, loss_fn, evaluation, report, progress.step, budget)
            if is_due(progress.step, args.save_interval) or numbers.get("save"):
                read_numbers()
                with meter.paused():
                    saver.save()
            if stopping or progress.step == total_steps:
                break
        read_numbers()
        saver.save()
        saver.close()
        report.close()
    if stopping:
        run.log(f"stopped after step {progress.step} of {total_steps}; everything is saved. Continue with:")
        run.log(f"  {saver.resume_command}")
        raise SystemExit(128 + (run.stop_signal or signal.SIGTERM))
    run.log(f"done: {saver.weights_path}  log: {report.path}")


def is_due(step: int, interval: int) -> bool:
    """True every ``interval`` steps; never for 0."""
    return interval > 0 and step % interval == 0


def tokens_per_batch(batch_size: int, lengths: np.ndarray) -> int:
    """Positions in a micro-batch: ``batch_size`` rows of mean length, and at least one of the longest."""
    return max(round(batch_size * float(lengths.mean())), int(lengths.max()) + 15)


def steps_left(
    run: Run, collate, plans: list, window: int, progress: Progress, meter: Meter, depth: int
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Yield, for every optimizer step from ``progress`` on, an iterator over this rank's micro-batches of that step.

    A step takes the next ``window`` micro-batches of the epoch's plan, each rank every world_size-th of them; the last
    window of an epoch may be short. ``progress`` already stands behind the step when it is yielded, so a state saved
    right after the step continues with the next one.
    """
    for epoch in range(progress.epoch, len(plans)):
        starts = range(progress.next_batch, len(plans[epoch]), window)
        shares = [plans[epoch][start : start + window][run.rank :: run.world_size] for start in starts]
        order = [ids for share in shares for ids in share]
        source = prefetch(collate, order, depth) if depth else contextlib.nullcontext(map(collate, order))
        with source as batches:
            for start, share in zip(starts, shares, strict=True):
                progress.epoch, progress.next_batch = epoch, start + window
                yield (meter.wait_for(batches) for _ in share)
        progress.next_batch = 0


def add_gradients(run: Run, model, loss_fn, micro_batches: Iterator, scaler, scale: float) -> tuple[list[str], Tensor]:
    """Forward and backward of this rank's micro-batches of one step; gradients add up in ``.grad``.

    ``scale`` multiplies the loss sums before the backward pass: float16 could not hold the gradient of a sum.
    Returns: names and sums (K,) float32 of loss, weight, real tokens, positions computed, and the stage's metrics; no
        names when this rank has no micro-batch, which happens in the last window of an epoch.
    """
    names, sums = [], torch.zeros(0, device=run.device)
    for batch in micro_batches:
        counted = {"tokens": int(batch["lengths"].sum()), "positions": batch["input_ids"].numel()}
        batch = run.to_device(batch)
        with run.autocast():
            loss, weight, metrics = loss_fn(model, batch)
        scaler.scale(loss * scale).backward()
        values = {"loss": loss.detach(), "weight": weight, **counted, **metrics}
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=run.device) for v in values.values()])
        names, sums = list(values), numbers if not names else sums + numbers
    return names, sums


def evaluate(
    run: Run, model, compiled, loss_fn, evaluation: Evaluation, report: Report, step: int, budget: int
) -> None:
    """Held-out figures and sample answers, into the log; redraws the curve."""
    measured = evaluation.measure(run, compiled, loss_fn, budget)
    if measured:
        report.line("held-out " + " ".join(f"{name.removeprefix('heldout_')}:{v:.4f}" for name, v in measured.items()))
        report.record({"step": step, **measured})
    if run.is_main:
        for question, answer in evaluation.answers(model):
            report.line(f"👶: {question}\n🤖️: {answer}")
    report.plot()
