"""Experiment trackers behind one interface: ``log(values, step)``, ``id`` (to go on with the same run), ``finish()``.

Each package is imported only when ``--tracker`` names it. All of them work without network: WANDB_MODE=offline,
SWANLAB_MODE=offline; TensorBoard writes files under {out_dir}/logs.
"""

from pathlib import Path


class Wandb:
    """https://docs.wandb.ai; keys and steps are those of out/logs/*.jsonl."""

    def __init__(self, args, name: str, run_id: str | None):
        import wandb

        self._run = wandb.init(
            project=args.wandb_project,
            name=args.wandb_run_name or name,
            config=vars(args),
            id=run_id,
            resume="allow" if run_id else None,
        )
        self.id = self._run.id

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class SwanLab:
    """https://docs.swanlab.cn"""

    def __init__(self, args, name: str, run_id: str | None):
        import swanlab

        self._swanlab = swanlab
        run = swanlab.init(
            project=args.wandb_project,
            experiment_name=args.wandb_run_name or name,
            config=vars(args),
            **({"id": run_id, "resume": "allow"} if run_id else {}),
        )
        self.id = getattr(run, "id", None)

    def log(self, values: dict[str, float], step: int) -> None:
        self._swanlab.log(values, step=step)

    def finish(self) -> None:
        self._swanlab.finish()


class TensorBoard:
    """``tensorboard --logdir out/logs``; a continued run appends to the same folder."""

    def __init__(self, args, name: str, run_id: str | None):
        from torch.utils.tensorboard import SummaryWriter

        self.id = run_id or name
        self._writer = SummaryWriter(Path(args.out_dir) / "logs" / "tensorboard" / self.id)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class NoTracker:
    """The default."""

    id = None

    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


def start_tracker(run, args, name: str, run_id: str | None = None):
    """The tracker of ``--tracker`` on the main process, one that does nothing elsewhere.

    Args: name: of the run unless ``--wandb_run_name`` gives one; run_id: of the tracker's run to go on with, or None.
    Raises: SystemExit, with the cause, when it cannot start.
    """
    kinds = {"wandb": Wandb, "swanlab": SwanLab, "tensorboard": TensorBoard}
    if not run.is_main or args.tracker == "none":
        return NoTracker()
    try:
        return kinds[args.tracker](args, name, run_id)
    except Exception as error:  # somebody else's package, with errors of its own
        raise SystemExit(
            f"--tracker {args.tracker} does not start: {type(error).__name__}: {error}\nWithout network or account set "
            "WANDB_MODE=offline or SWANLAB_MODE=offline; --tracker none trains without it."
        ) from error
