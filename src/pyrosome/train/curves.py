"""A run's curves: one JSON line a step, cut back on resume to the step that was saved, and drawn.

A row has "step", "tokens", "stage", "loss", "mtp_loss", "indexer_loss", "balance", "grad_norm", "lr", "seconds" and
"tokens_per_s"; "accuracy" ({kind: share right}) where the run was evaluated.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrosome.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

LOSSES = ("loss", "mtp_loss", "indexer_loss")
_HIGHEST_LOSS = 8.0  # drawn: one spike, where a stage begins, would flatten all else
_SMOOTHED_OVER = 50  # steps, at most; a short run over fewer


class Curves:
    """The file of a run's curves, open for appending.  `offset` is its length in bytes.

    Each row is with the system when `append` returns, so that a killed process loses none.  Call `sync` before a
    training state is saved: the state must not reach the disk before the rows up to its step.

    Args:
        path: made if missing, with its directory.
        step: rows after this step are dropped, and what is torn or damaged with all that follows it.

    Raises:
        CheckpointError: the file cannot be read or written.
    """

    def __init__(self, path: str | Path, step: int = 0) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self.offset, last = _kept(self.path.read_bytes(), step)
            os.ftruncate(self._handle, self.offset)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if last < step:
            log.warning("%s ends at step %d and the run goes on from %d: rows between are lost", self.path, last, step)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; numbers that are not finite are written as null, which JSON can hold.

        Raises:
            CheckpointError: it cannot be written, as on a full disk; what is torn is cut off when the run goes on.
        """
        line = json.dumps(_finite(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            while line:
                written = os.write(self._handle, line)
                self.offset, line = self.offset + written, line[written:]
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def sync(self) -> None:
        """Wait until all rows are on the disk.

        Raises:
            CheckpointError: they cannot be written.
        """
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def close(self) -> None:
        """Close the file; twice does no harm."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """Every row; a last line that a killed process tore is left out.

    Raises:
        CheckpointError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"curves {path} cannot be read: {error}; name the curves.jsonl of a run") from None
    rows = [_row(line) for line in lines[:-1]]  # what follows the last newline is torn, or empty
    if None in rows:
        raise CheckpointError(
            f"line {rows.index(None) + 1} of {path} is no row of curves; resume the run to cut it off"
        )
    return [row for row in rows if row is not None]


def plot(path_jsonl: str | Path, path_png: str | Path) -> None:
    """Draw losses, accuracy by kind and learning rate over tokens, with the borders of stages.

    Raises:
        CheckpointError: as `read`, or the picture cannot be written.
        RequestError: matplotlib is not installed, or there is no step to draw.
    """
    rows = read(path_jsonl)
    if not rows:
        raise RequestError(f"{path_jsonl} has no step yet, and so nothing to draw; let the run take one")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError(f"drawing curves needs matplotlib ({error}): pip install 'pyrosome[train]'") from None
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy, lr = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    _draw_losses(losses, rows)
    _draw_accuracy(accuracy, rows)
    lr.plot(*_points(rows, "lr"), color="black", linewidth=1)
    lr.set(ylabel="learning rate", xlabel="tokens", ylim=(0, None))
    for axes in (losses, accuracy, lr):
        for tokens, _ in _borders(rows)[1:]:
            axes.axvline(tokens, color="grey", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.2)
    for tokens, stage in _borders(rows):
        at = {"xycoords": ("data", "axes fraction"), "fontsize": "small", "color": "grey", "rotation": 40}
        losses.annotate(str(stage), (tokens, 1.01), **at)
    partial = Path(path_png).with_name(f".{Path(path_png).name}.partial")
    try:
        figure.savefig(partial, dpi=110, format="png")
        os.replace(partial, path_png)
    except OSError as error:
        raise _unwritable(Path(path_png), error) from None
    finally:
        partial.unlink(missing_ok=True)


def _kept(raw: bytes, step: int) -> tuple[int, int]:
    """(bytes, last step) of the rows up to `step`, whole and in order."""
    offset, last = 0, 0
    for line in raw.splitlines(keepends=True):
        row = _row(line.rstrip(b"\n")) if line.endswith(b"\n") else None
        if row is None or not last < row["step"] <= step:
            break
        offset, last = offset + len(line), row["step"]
    return offset, last


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


def _finite(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {k: _finite(x) for k, x in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(x) for x in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {error}; free the disk or choose another directory, and resume")


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the rows that have the key."""
    held = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None and "tokens" in row]
    return [at for at, _ in held], [value for _, value in held]


def _borders(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, Any]]:
    """(tokens, stage) where each stage begins."""
    found: list[tuple[int, Any]] = []
    for row in rows:
        if "stage" in row and (not found or found[-1][1] != row["stage"]):
            found.append((row["tokens"], row["stage"]))
    return found


def smoothed(values: Sequence[float], over: int) -> list[float]:
    """Running mean with exponentially falling weights, `over` values wide, that does not lean on its beginning."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = total * (1 - 1 / over) + value, weight * (1 - 1 / over) + 1
        out.append(total / weight)
    return out


def _draw_losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    held = [_points(rows, key) for key in LOSSES]
    for key, (tokens, values) in zip(LOSSES, held, strict=True):
        if values:
            (line,) = axes.plot(tokens, values, linewidth=0.5, alpha=0.3)
            over = max(1, min(_SMOOTHED_OVER, len(values) // 10))
            axes.plot(tokens, smoothed(values, over), color=line.get_color(), label=key.replace("_", " "))
    top = max((max(values[len(values) // 50 :], default=1.0) for _, values in held if values), default=1.0)
    axes.set(ylabel="loss (nats per token)", ylim=(0, min(top, _HIGHEST_LOSS)))
    if axes.lines:
        axes.legend(loc="upper right", fontsize="small")


def _draw_accuracy(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = [{"tokens": row["tokens"], **row["accuracy"]} for row in rows if row.get("accuracy")]
    for kind in dict.fromkeys(k for row in flat for k in row if k != "tokens"):
        axes.plot(*_points(flat, kind), marker=".", linewidth=1, label=kind)
    axes.set(ylabel="held-out accuracy", ylim=(-0.02, 1.02))
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")  # a dozen kinds would hide curves
