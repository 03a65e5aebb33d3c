"""What happened in a run: a CSV file, optional TensorBoard curves, a line on the terminal."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import CatError
from ..files import whole_file


class RunLog:
    """Rows of numbers into `folder`/log.csv, and as curves into `folder`/tensorboard when asked. A resumed run continues the file after `update`."""

    def __init__(self, folder: Path, *, update: int = 0, tensorboard: bool = False) -> None:
        self.file = folder / "log.csv"
        self.writer = open_tensorboard(folder / "tensorboard", update) if tensorboard else None
        kept = [row for row in read_rows(self.file) if int(row["update"]) <= update]  # rows of a run that went on after its last save are cut
        self.columns = list(kept[0]) if kept else []
        write_rows(self.file, self.columns, kept)

    def write(self, row: dict[str, Any]) -> None:
        """row: "update" and any numbers; a number that comes for the first time gets a new column."""
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            write_rows(self.file, self.columns, read_rows(self.file))
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self.columns).writerow(row)
        if self.writer:
            for name in row.keys() - {"update"}:
                self.writer.add_scalar(name, row[name], row["update"])

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a log; one that a crash cut off is left out. CatError for a file that no run wrote, which is never replaced."""
    if not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            found = csv.DictReader(stream)
            if "update" not in (found.fieldnames or ["update"]):
                raise ValueError(f"its columns are {', '.join(found.fieldnames)}")
            return [row for row in found if None not in (*row, *row.values()) and row["update"].isdecimal()]
    except (ValueError, csv.Error) as error:  # Unicode errors are ValueErrors
        raise CatError(f"{file} is no log of a run ({error}): move it away, or choose another output folder.") from None


def write_rows(file: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with whole_file(file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        out = csv.DictWriter(stream, columns)
        out.writeheader()
        out.writerows(rows)


def open_tensorboard(folder: Path, update: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise CatError("TensorBoard is not installed: install the package tensorboard, or leave the option out (log.csv is written always).") from None
    return SummaryWriter(str(folder), purge_step=update + 1)


class ProgressLine:
    """Prints how far a run is, at most once in `every` seconds."""

    def __init__(self, every: float = 5.0) -> None:
        self.every, self.last, self.start, self.first = every, -every, time.monotonic(), None

    def __call__(self, step: Any) -> None:
        """step: a `Step` of the run."""
        self.first = step.update - 1 if self.first is None else self.first
        now = time.monotonic()
        if now - self.last < self.every and step.update < step.updates:
            return
        self.last = now
        left = (now - self.start) / (step.update - self.first) * (step.updates - step.update)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in step.numbers.items())
        print(f"update {step.update}/{step.updates}  {numbers}  about {left:.0f} s left", file=sys.stderr, flush=True)
