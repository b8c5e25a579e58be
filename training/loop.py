"""The training loop: one optimizer update ("step") per window of micro-batches. Every stage runs this function.

A step's gradient is the gradient of the mean over all supervised tokens of that step - of all its micro-batches, on
all ranks: every micro-batch adds the gradient of a *sum*, one all-reduce adds up the ranks, and one division follows.
So 8x1, 4x2 and 3+3+2 micro-batches, or one process and two, make the same update.

The host never waits for the device inside a step: it reads a step's numbers while the device already works on the next.
What can go wrong around it (signals, non-finite gradients, broken weights, full disks, other processes) is in
processes.py, watch.py, guard.py and saver.py.
"""

import contextlib
import math
import signal
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from common.flags import plain_errors
from dataset.batching import plan_batches, prefetch

from .checkpoint import Progress, new_run_flags
from .evaluation import Evaluation
from .guard import WeightGuard
from .inputs import Data
from .memory import KeptMemory, memory_report, out_of_memory_advice
from .optim import lr_at, make_updater
from .processes import Run, leave_together
from .report import Meter, Report, fold
from .saver import MAX_BAD_STEPS, Saver, launch_command
from .signals import stop_on_signals
from .trackers import start_tracker
from .watch import Watch

LOOKS = (10, 20, 50, 100, 200)  # steps before the first interval is over that are logged and evaluated all the same
FEW_STEPS = 20  # of a whole run, below which it teaches next to nothing
QUICK_TOKENS = 20_000  # positions of held-out data that even a CPU measures in seconds


def train(
    run: Run,
    args,
    model: nn.Module,
    data: Data,
    loss_fn,
    evaluation: Evaluation,
    *,
    weights=nn.Module.state_dict,
    trained_name: str = "LLM总参数量",
) -> None:
    """Train ``model`` on ``data`` as the flags in ``args`` say; write weights, states to resume from, and the log.

    Args:
        data: training.inputs.Data: units with ``lengths`` and ``collate(ids) -> micro-batch``, and a fingerprint.
        loss_fn: (model, micro-batch) -> (loss sum, weight, metric sums); dividing by the weight gives the mean.
        weights: model -> the state dict that is saved for people (LoRA saves less than everything).
        trained_name: what the log calls the number of parameters that are trained.
    Raises: SystemExit: with 128 + n after saving when signal n stopped the run; with a message when steps keep failing,
        when memory does not suffice, when the weights are broken, and when the final save failed.
    """
    with stop_on_signals(run), out_of_memory_advice(args):
        budget = tokens_per_batch(args.batch_size, data.train.lengths)
        window = args.accumulation_steps * run.world_size

        model.to(run.device).train()
        run.broadcast(model)
        with plain_errors():
            memory, needed = memory_report(run, args, model, loss_fn, data.train, budget)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        guard = WeightGuard(run, model, data.train)
        updater = make_updater(run, args, model)
        share = run.world_size if updater.equal_shares else 1

        def plan(epoch: int) -> list[np.ndarray]:
            """The micro-batches of an epoch, the same number in each; made when the epoch begins."""
            batches = plan_batches(data.train.lengths, budget, args.seed, epoch)
            return batches[: len(batches) // share * share]

        progress, meter = Progress(), Meter()
        saver = Saver(run, args, model.config, updater, progress, weights, data.fingerprint, guard)
        with plain_errors():
            saver.resume()
        batches = len(plan(0))
        all_steps = count_steps(batches, args.epochs, window, progress, run.log)
        total_steps = min(all_steps, args.max_steps or all_steps)
        if progress.step >= total_steps:
            with plain_errors():
                saver.restore_weights()
            run.log(f"this run is already complete: {saver.weights_path}")
            return

        tracker = start_tracker(run, args, saver.run_name, saver.tracker_id)
        saver.tracker_id = tracker.id
        report = Report(run, args, saver.run_name, total_steps, progress.step, tracker)
        report.line(f"{trained_name}：{trained / 1e6:.3f} 百万")
        report.line(
            f"{run.device.type}, {str(run.dtype).removeprefix('torch.')}: {len(data.train)} sequences, {total_steps} "
            f"steps of {args.accumulation_steps} micro-batches x {run.world_size} processes x {budget} tokens"
        )
        report.line(fold(memory))
        if args.warmup_iters >= total_steps:
            reached = lr_at(total_steps - 1, total_steps, args.learning_rate, args.warmup_iters)
            report.line(
                f"!!! --warmup_iters {args.warmup_iters}: the run has {total_steps} steps, so the learning rate gets "
                f"no further than {reached:.1e} of {args.learning_rate:.1e}; a tenth of the run, "
                f"{math.ceil(total_steps / 10)}, is a usual warm-up"
            )
        if all_steps < FEW_STEPS:
            report.line(fold(few_steps_remark(args, all_steps, len(data.train))))
        watch, kept = Watch(meter, progress, report), KeptMemory(needed)

        def look(is_early: bool) -> None:
            watch.read()
            with meter.paused():
                evaluate(run, updater.full_model(), loss_fn, evaluation, report, progress.step, budget, is_early)

        first_step = progress.step
        if first_step == 0 and args.eval_interval:
            look(is_early=True)
        meter.reset()

        collate, depth = run.pinned(data.train.collate), args.num_workers
        for micro_batches in steps_left(run, collate, plan, args.epochs, window, progress, meter, depth):
            lr = lr_at(progress.step, total_steps, args.learning_rate, args.warmup_iters, args.lr_schedule)
            place = place_in_epoch(progress, batches, window)
            tell = partial(report.log_micro_batch, progress, meter, lr, place)
            names, sums = add_gradients(run, updater, loss_fn, micro_batches, 1 / budget, tell)
            if not meter.names:
                meter.names = [*run.from_main(names), "stop", "save", "grad_norm", "skipped"]
            if not names:
                sums = torch.zeros(len(meter.names) - 4, device=run.device)
            wishes = run.stack([float(bool(run.stop_signal)), float(saver.is_time())])
            sums, norm, skipped = updater.step(torch.cat([sums, wishes]), 1 / budget, lr)

            watch.read()  # the step before: its numbers have arrived, nobody waits
            watch.put(run.fetch(torch.cat([sums, norm[None], skipped[None]])))
            progress.step += 1
            report.step_done()
            kept.end_step()
            is_last = progress.step == total_steps
            is_first = progress.step == first_step + 1  # told at once, not only after log_interval steps
            if is_last or is_first or is_due(progress.step, args.log_interval, LOOKS):
                watch.read()
                report.log_step(progress, meter, lr, place, total_steps)
            if is_last or (is_due(progress.step, args.eval_interval, LOOKS) and not watch.stop):
                look(is_early=not (is_last or is_due(progress.step, args.eval_interval)))
            if is_last or watch.stop or watch.is_failing or saver.is_broken:
                break
            if watch.save_due or is_due(progress.step, args.save_interval):
                watch.read()
                watch.save_due = False
                with meter.paused():
                    saver.save()
        watch.read()
        saver.save(final=True)
        report.close()
        saver.close()
    if not is_last or saver.problem:
        leave_together(run)
    saver.refuse_broken()
    if watch.is_failing:
        raise SystemExit(
            f"{MAX_BAD_STEPS} steps in a row had a non-finite gradient and changed nothing; the weights before them "
            f"are in {saver.weights_path}. Start a new run with a --learning_rate below {args.learning_rate} and "
            f"{new_run_flags(vars(args), saver.weights_path)}; or continue in full precision with --resume "
            "--dtype float32."
        )
    if not is_last:
        run.log(f"stopped after step {progress.step} of {total_steps}; everything is saved. Continue with:")
        run.log(f"  {launch_command()}")
        raise SystemExit(128 + (run.stop_signal or signal.SIGTERM))
    run.log(f"done: {saver.weights_path}  log: {report.path}")


def few_steps_remark(args, steps: int, rows: int) -> str:
    """What a run of very few optimizer steps means, and the flags that make more of them."""
    flags = [f"--epochs above {args.epochs}", f"--batch_size below {args.batch_size}"]
    if args.accumulation_steps > 1:
        flags.append(f"--accumulation_steps below {args.accumulation_steps}")
    return (
        f"!!! only {steps} optimizer steps: {rows} rows to train on, of which a step takes about "
        f"{min(rows, args.batch_size * args.accumulation_steps)} on each process. The weights will hardly change. "
        f"More steps: {' or '.join(flags)}, or more rows (also a smaller --heldout_share {args.heldout_share})"
    )


def is_due(step: int, interval: int, early: tuple[int, ...] = ()) -> bool:
    """True every ``interval`` steps and, before the first of them, at the steps ``early``; never for interval 0."""
    return interval > 0 and (step % interval == 0 or (step < interval and step in early))


def tokens_per_batch(batch_size: int, lengths: np.ndarray) -> int:
    """Positions in a micro-batch: ``batch_size`` rows of mean length, and at least one of the longest."""
    return max(round(batch_size * float(lengths.mean())), int(lengths.max()) + 15)


def count_steps(batches: int, epochs: int, window: int, progress: Progress, log=print) -> int:
    """Optimizer steps of the whole run. ``progress.step`` becomes the number of those before ``progress``'s place.

    That changes it only if the run continues with another number of processes or micro-batches per step; it is told.
    Args: batches: micro-batches of each epoch; window: micro-batches of a step, of all processes together.
    """
    trained = min(progress.next_batch, batches)
    per_epoch, done, left = (math.ceil(count / window) for count in (batches, trained, batches - trained))
    step = progress.epoch * per_epoch + done
    if step != progress.step:
        log(f"a step has another size than in the saved run: its step {progress.step} is step {step} now")
    progress.step = step
    return step + left + (epochs - progress.epoch - 1) * per_epoch


def place_in_epoch(progress: Progress, batches: int, window: int) -> tuple[int, int]:
    """(optimizer steps made in the current epoch, optimizer steps that an epoch has)."""
    return math.ceil(min(progress.next_batch, batches) / window), math.ceil(batches / window)


def steps_left(
    run: Run, collate, plan, epochs: int, window: int, progress: Progress, meter: Meter, depth: int
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Yield, for every optimizer step from ``progress`` on, an iterator over this rank's micro-batches of that step.

    A step takes the next ``window`` micro-batches of the epoch's plan, each rank every world_size-th of them; the last
    window of an epoch may be short. ``progress`` already stands behind the step when it is yielded, so a state saved
    right after the step continues with the next one.
    Args: plan: epoch -> list of its micro-batches' ids; depth: micro-batches to prepare ahead.
    """
    for epoch in range(progress.epoch, epochs):
        planned = plan(epoch)
        starts = range(progress.next_batch, len(planned), window)
        shares = [planned[start : start + window][run.rank :: run.world_size] for start in starts]
        order = [ids for share in shares for ids in share]
        source = prefetch(collate, order, depth) if depth else contextlib.nullcontext(map(collate, order))
        with source as batches:
            for start, share in zip(starts, shares, strict=True):
                progress.epoch, progress.next_batch = epoch, start + window
                yield (meter.wait_for(batches) for _ in share)
        progress.next_batch = 0


def add_gradients(
    run: Run, updater, loss_fn, micro_batches: Iterator, scale: float, tell=lambda names, sums: None
) -> tuple[list[str], Tensor]:
    """Forward and backward of this rank's micro-batches of one step; gradients add up in ``.grad``.

    ``scale`` multiplies the loss sums before the backward pass: float16 could not hold the gradient of a sum.
    Args: tell: called with names and sums so far after each micro-batch.
    Returns: names and sums (K,) float32 of loss, weight, real tokens, positions computed, supervised tokens, and the
        stage's metrics; no names when this rank has no micro-batch, which happens in the last window of an epoch.
    """
    names, sums = [], torch.zeros(0, device=run.device)
    for batch in micro_batches:
        counted = {
            "tokens": int(batch["lengths"].sum()),
            "positions": batch["input_ids"].numel(),
            "targets": len(batch["targets"]),
        }
        batch = run.to_device(batch)
        with run.autocast():
            loss, weight, metrics = loss_fn(updater.model, batch)
        updater.backward(loss * scale)
        values = {"loss": loss, "weight": weight, **counted, **metrics}
        numbers = run.stack(values.values())
        names, sums = list(values), numbers if not names else sums + numbers
        tell(names, sums)
    return names, sums


def evaluate(
    run: Run, model, loss_fn, evaluation: Evaluation, report: Report, step: int, budget: int, is_early: bool
) -> None:
    """Held-out figures and sample answers, into the log; redraws the curves. Other ranks wait for rank 0's answers.

    An early evaluation must be quick: no curves, and no figures of a held-out set that would take a CPU minutes.
    """
    is_quick = run.device.type != "cpu" or evaluation.heldout.lengths.sum() <= QUICK_TOKENS
    if (is_quick or not is_early) and (measured := evaluation.measure(run, model, loss_fn, budget)):
        report.heldout(step, measured)
    if run.is_main:
        report.samples(evaluation.answers(model))
    if not is_early:
        report.plot()
    run.barrier()
