"""The training loop, which every stage runs; ``train`` is the page to read first.

A *step* is one optimizer update. Its gradient is that of the mean loss over all supervised tokens of the step - of all
its micro-batches, on all ranks: every micro-batch adds the gradient of a *sum*, one all-reduce adds up the ranks, and
one division follows. So 8x1, 4x2 and 3+3+2 micro-batches, or one process and two, make the same update.

The host never waits for the device inside a step: it reads a step's numbers while the device already works on the next.
What can go wrong around it (signals, non-finite gradients, broken weights, full disks, other processes) is in
processes.py, watch.py, guard.py and saver.py. A stage with another source of batches writes a loop of its own from the
same parts, as tests/test_own_loop.py does.
"""

import math
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn

from common.flags import plain_errors
from dataset.batching import tokens_per_batch

from .checkpoint import Progress, new_run_flags
from .evaluation import Evaluation
from .guard import WeightGuard
from .inputs import Data, origin
from .kept_memory import KeptMemory
from .memory import memory_report, out_of_memory_advice
from .optim import lr_at
from .processes import Run, leave_together
from .report import Meter, Report, fold
from .saver import MAX_BAD_STEPS, Saver, launch_command
from .signals import stop_on_signals
from .source import PlannedBatches
from .stats import StepStats
from .trackers import start_tracker
from .updater import make_updater
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
    facts: dict | None = None,
) -> None:
    """Train ``model`` on ``data`` as the flags in ``args`` say; write weights, states to resume from, and the log.

    Args:
        data: training.inputs.Data: units with ``lengths`` and ``collate(ids) -> micro-batch``, and a fingerprint.
        loss_fn: (model, micro-batch) -> (loss sum, weight, metric sums); dividing by the weight gives the mean.
        weights: model -> the state dict that is saved for people (LoRA saves less than everything).
        facts: of this stage alone, for the record beside the weights: an adapter's rank, the teacher.
        trained_name: what the log calls the number of parameters that are trained.
    Raises: SystemExit: with 128 + n after saving when signal n stopped the run; with a message when steps keep failing,
        when memory does not suffice, when the weights are broken, and when the final save failed.
    """
    with stop_on_signals(run), out_of_memory_advice(args):
        parts = set_up(run, args, model, data, loss_fn, weights, trained_name, facts)
        if parts is None:  # nothing is left to do
            return
        progress, source, updater, stats = parts.progress, parts.source, parts.updater, parts.stats
        meter, watch, report, saver = parts.meter, parts.watch, parts.report, parts.saver
        look = partial(evaluate, run, updater, loss_fn, evaluation, parts.budget, progress, watch, report)

        first_step = progress.step  # 0, or where --resume continues
        if first_step == 0 and args.eval_interval:
            look(is_early=True)
        meter.reset()  # time runs from here
        for micro_batches in source:  # one turn is one step
            # Read: this rank's micro-batches of one step; a thread prepares them ahead (--num_workers).
            place = source.place()
            lr = lr_at(progress.step, parts.total_steps, args.learning_rate, args.warmup_iters, args.lr_schedule)

            # Forward and backward: every micro-batch adds the gradient of its loss sum.
            stats.begin()
            tell = partial(report.log_micro_batch, place, lr, meter, stats)
            add_gradients(run, updater, loss_fn, meter.timed(micro_batches), stats, tell)

            # Update: add up the ranks (their wishes too), divide by the step's tokens, clip, one step of the optimizer.
            stats.wish(stop=bool(run.stop_signal), save=saver.is_time())
            updater.step(stats, lr)
            watch.put(stats.fetch())  # read one step later: the device gets its next work before the host looks at this
            progress.step += 1
            is_last = progress.step == parts.total_steps

            # Log: the first step at once, then often, then every --log_interval steps.
            is_first = progress.step == first_step + 1
            report.step_done()
            parts.memory.end_step()
            if is_last or is_first or is_due(progress.step, args.log_interval, LOOKS):
                watch.read()
                report.log_step(progress, place, lr, meter)

            # Evaluate: a quick look often at the beginning, a whole one every --eval_interval steps and at the end.
            is_whole = is_last or is_due(progress.step, args.eval_interval)
            if is_last or (is_due(progress.step, args.eval_interval, LOOKS) and not watch.stop):
                look(is_early=not is_whole)

            # Save: every --save_interval steps, every --save_minutes minutes, and at the end, whatever ends the run.
            if is_last or watch.stop or watch.is_failing or saver.is_broken:
                break
            if watch.save_due or is_due(progress.step, args.save_interval):
                watch.read()  # a state counts the tokens of every step before it
                watch.save_due = False
                with meter.paused():
                    saver.save()
        watch.read()
        saver.save(final=True)
        report.close()
        saver.close()
    say_how_it_ended(run, args, parts, is_last)


@dataclass
class Parts:
    """What a run is made of. Each part is told in the file of its class."""

    progress: Progress
    source: PlannedBatches
    updater: object  # training.updater.Updater, or one with the same methods
    stats: StepStats
    meter: Meter
    watch: Watch
    report: Report
    saver: Saver
    memory: KeptMemory
    total_steps: int
    budget: int  # positions of a full micro-batch


def set_up(
    run: Run, args, model: nn.Module, data: Data, loss_fn, weights, trained_name: str, facts: dict | None
) -> Parts | None:
    """Make the parts, continue a saved run if ``--resume`` says so, and say what will be done; None if all is done.

    What can be refused is refused before the tracker and the log are opened.
    """
    budget = tokens_per_batch(args.batch_size, data.train.lengths)
    model.to(run.device).train()
    run.broadcast(model)
    with plain_errors():
        memory, needed = memory_report(run, args, model, loss_fn, data.train, budget)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    guard = WeightGuard(run, model, data.train)
    updater = make_updater(run, args, model, scale=1 / budget)
    source = PlannedBatches(
        run, data.train, budget, epochs=args.epochs, accumulation_steps=args.accumulation_steps, seed=args.seed,
        prefetched=args.num_workers, equal_shares=updater.equal_shares,
    )  # fmt: skip
    progress = Progress()
    saver = Saver(
        run, args, model.config, updater, source, progress, guard,
        data_fingerprint=data.fingerprint, weights=weights, origin={**origin(args, data), **(facts or {})},
        tokenizer=data.tokenizer,
    )  # fmt: skip
    with plain_errors():
        saver.resume()
    all_steps = count_steps(source, progress, run.log)
    total_steps = min(all_steps, args.max_steps or all_steps)
    if progress.step >= total_steps:
        with plain_errors():
            saver.restore_weights()
        run.log(f"this run is already complete: {saver.weights_path}")
        return None

    tracker = start_tracker(run, args, saver.run_name, saver.tracker_id)
    saver.tracker_id = tracker.id
    report = Report(run, args, saver.run_name, total_steps, progress.step, tracker)
    report.line(f"{trained_name}：{trained / 1e6:.3f} 百万")
    report.line(
        f"{run.device.type}, {str(run.dtype).removeprefix('torch.')}: {len(data.train)} sequences, {total_steps} steps "
        f"of {args.accumulation_steps} micro-batches x {run.world_size} processes x {budget} tokens"
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
    meter = Meter()
    watch = Watch(meter, progress, report)
    return Parts(
        progress, source, updater, StepStats(run), meter, watch, report, saver, KeptMemory(needed), total_steps, budget
    )


def count_steps(source: PlannedBatches, progress: Progress, log=print) -> int:
    """Optimizer steps of the whole run. ``progress.step`` becomes the number of those before the source's place.

    That changes it only if the run continues with another number of processes or micro-batches per step; it is told.
    After 100 steps of two processes, one process is at its step 200: the learning rate goes on where it was.
    """
    done = source.steps_done()
    if done != progress.step:
        log(f"a step has another size than in the saved run: its step {progress.step} is step {done} now")
    progress.step = done
    return done + source.steps_left()


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


def add_gradients(
    run: Run, updater, loss_fn, micro_batches: Iterable, stats: StepStats, tell: Callable[[], None] = lambda: None
) -> None:
    """Forward and backward of this rank's micro-batches of one step; gradients add up in ``.grad``.

    Args:
        micro_batches: may be none, in the last window of an epoch.
        stats: gets the sums of loss, weight, real tokens, positions computed, supervised tokens, and metrics.
        tell: called after each micro-batch.
    """
    for batch in micro_batches:
        counted = {
            "tokens": int(batch["lengths"].sum()),
            "positions": batch["input_ids"].numel(),
            "targets": len(batch["targets"]),
        }
        batch = run.to_device(batch)
        with run.autocast():
            loss, weight, metrics = loss_fn(updater.model, batch)
        updater.backward(loss)
        stats.add({"loss": loss, "weight": weight, **counted, **metrics})
        tell()


def evaluate(
    run: Run,
    updater,
    loss_fn,
    evaluation: Evaluation,
    budget: int,
    progress: Progress,
    watch: Watch,
    report: Report,
    is_early: bool = False,
) -> None:
    """Held-out figures and sample answers, into the log; redraws the curves. Other ranks wait for rank 0's answers.

    An early evaluation must be quick: no curves, and no figures of a held-out set that would take a CPU minutes.
    """
    watch.read()
    with watch.meter.paused():
        model = updater.full_model()
        is_quick = run.device.type != "cpu" or evaluation.heldout.lengths.sum() <= QUICK_TOKENS
        if (is_quick or not is_early) and (measured := evaluation.measure(run, model, loss_fn, budget)):
            report.heldout(progress.step, measured)
            progress.heldout = {"step": progress.step, **measured}
        if run.is_main:
            report.samples(evaluation.answers(model))
        if not is_early:
            report.plot()
        run.barrier()


def say_how_it_ended(run: Run, args, parts: Parts, is_last: bool) -> None:
    """Say where everything is. Raises SystemExit unless the last step was made and is saved."""
    progress, saver = parts.progress, parts.saver
    if not is_last or saver.problem:
        leave_together(run)
    saver.refuse_broken()
    if parts.watch.is_failing:
        raise SystemExit(
            f"{MAX_BAD_STEPS} steps in a row had a non-finite gradient and changed nothing; the weights before them "
            f"are in {saver.weights_path}. Start a new run with a --learning_rate below {args.learning_rate} and "
            f"{new_run_flags(vars(args), saver.weights_path)}; or continue in full precision with --resume "
            "--dtype float32."
        )
    if not is_last:
        run.log(f"stopped after step {progress.step} of {parts.total_steps}; everything is saved. Continue with:")
        run.log(f"  {launch_command()}")
        raise SystemExit(128 + (run.stop_signal or signal.SIGTERM))
    run.log(f"done: {saver.weights_path}  log: {parts.report.path}")
