"""The curves of a run, drawn from its log: ``out/logs/<run>.png``, one panel for each thing that its stage measures."""

import contextlib
import json
from pathlib import Path

from common.files import whole_file

# What a panel's axis says, and the names of its curves in the log: in training, on held-out data. A panel whose names
# the log lacks is left out.
PANELS = (
    ("bits per byte", None, "bits_per_byte"),
    ("reward margin", "reward_margin", "heldout_reward_margin"),
    ("preference accuracy", "reward_accuracy", "heldout_reward_accuracy"),
    ("KL to the teacher", "kl", "heldout_kl"),
    ("answers with all tags", None, "tag_obedience"),
    ("expert balance", "expert_entropy", "heldout_expert_entropy"),
)
# What one unit of loss is, by a name that only this stage logs; in all other stages it is a token.
LOSS_LABELS = {
    "reward_margin": "DPO loss (per pair)",
    "kl": "cross-entropy + alpha T² KL\n(nats per token)",
    "tag_obedience": "loss (nats per weighted token)",
}


def read_log(path: Path) -> list[dict]:
    """The records of a log file; a line that was cut off by a kill or a full disk is left out."""
    records = []
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def series(records: list[dict], name: str | None) -> list[tuple[int, float]]:
    """(step, value) of every record with this name, by step. Steps that a continued run repeated count once."""
    return sorted({r["step"]: r[name] for r in records if name in r and "step" in r}.items())


def plot_log(log_path: Path) -> Path | None:
    """Draw the curves of a log beside it; None while there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(read_log(log_path), Path(log_path).stem)
    if figure is None:
        return None
    path = Path(log_path).with_suffix(".png")
    with whole_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    return path


def draw(records: list[dict], title: str):
    """A matplotlib Figure: panels below each other, all against the step; None without anything to draw.

    The legends stand above the panels and give first and last value of the held-out curve: step 0 is before training.
    """
    from matplotlib.figure import Figure

    names = set().union(*records)
    label = next((text for name, text in LOSS_LABELS.items() if name in names), "loss (nats per token)")
    panels = [
        (label, series(records, trained), series(records, heldout))
        for label, trained, heldout in ((label, "loss", "heldout_loss"), *PANELS)
        if trained in names or heldout in names
    ]
    if not panels:
        return None
    heights = [2.0] + [1.0] * (len(panels) - 1)
    figure = Figure(figsize=(8, 1 + 1.8 * sum(heights)), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (label, trained, heldout) in zip(rows, panels, strict=True):
        if trained:
            axes.plot(*zip(*trained, strict=True), color="tab:blue", linewidth=1, marker=".", label="training")
        if heldout:
            (_, first), (_, last) = heldout[0], heldout[-1]
            values = f"held-out: {first:.3f} → {last:.3f}"
            axes.plot(*zip(*heldout, strict=True), color="tab:red", marker="o", markersize=4, label=values)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0)
    rows[-1].set_xlabel("step (optimizer updates)")
    figure.suptitle(title)
    figure.align_ylabels()
    return figure
