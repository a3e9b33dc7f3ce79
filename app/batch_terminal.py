"""Drawing a batch on the terminal: progress on stderr, what came of it on stdout."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ..pipelines.batch.attempt import Ended
from ..pipelines.batch.report import Standing, Summary, words
from ..pipelines.events import STAGES, Notice

if TYPE_CHECKING:
    from ..pipelines.batch import Batch
    from ..pipelines.batch.report import Failure, Status

_LINE_S = 30.0
"""How often a line tells how it stands where stderr is a file."""
_MOST_LINES = 20


def follow(
    events: Generator[Standing | Ended | Notice | Summary, None, None], console: Console
) -> Summary:
    """Show progress on `console` until the summary is there, and return it."""
    columns = (
        TextColumn("{task.completed}/{task.total} rows", style="bold"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[told]}", style="dim"),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bars.add_task("", total=None, told="starting")
    last_s = time.monotonic()
    with closing(events), bars:
        for event in events:
            if isinstance(event, Summary):
                return event
            if isinstance(event, Notice):
                console.print(f"note: {event.text}", style="yellow", markup=False, soft_wrap=True)
            elif isinstance(event, Ended):
                _tell(event, console)
            elif console.is_terminal:
                bars.update(task, total=event.rows, completed=event.done + event.failed,
                            told=_told(event))  # fmt: skip
            elif time.monotonic() - last_s > _LINE_S:
                last_s = time.monotonic()
                _line(f"{event.done + event.failed}/{event.rows} rows ({_told(event)})", console)
    raise RuntimeError("the batch ended without a summary")


def _told(standing: Standing) -> str:
    times = duration(standing.elapsed_s)
    if standing.eta_s is not None:
        times += f", about {duration(standing.eta_s)} left"
    failed = f", {standing.failed} failed" if standing.failed else ""
    return f"{times}{failed}"


def _tell(ended: Ended, console: Console) -> None:
    if ended.status == "done" and not console.is_terminal:
        _line(f"done {ended.path} ({ended.seconds:.1f} s)", console)
    elif ended.status in ("failed", "retried"):
        again = ", will be tried again" if ended.status == "retried" else ""
        _line(f"failed line {ended.line}, {ended.name}{again}: {ended.reason}", console)


def show_summary(summary: Summary, batch: Batch, console: Console) -> None:
    """The folder, counts, throughput, times by stage, densities, failures."""
    _line(str(batch.store.path), console)
    counts = {
        "done": summary.done,
        "done before": summary.before,
        "failed": summary.failed,
        "left out": summary.refused,
        "left": summary.left,
    }
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    _line(f"{_rows(summary.rows + summary.refused)}: {told or 'nothing'}", console)
    if summary.done:
        workers = f"{summary.workers} {'worker' if summary.workers == 1 else 'workers'}"
        _line(
            f"{duration(summary.elapsed_s)} with {workers}: {summary.rows_per_hour:,.0f} rows an "
            f"hour",
            console,
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        stages = [stage for stage in STAGES if stage in summary.stages_s]
        for stage in stages:
            table.add_column(stage, justify="right")
        table.add_row(
            "a row", *(f"{summary.stages_s[stage] / summary.done:.2f} s" for stage in stages)
        )
        console.print(table)
    for name, share in summary.shares("density").items():
        _line(f"{share:.0%} of all pairs of tokens computed: {name}", console)
    for name, share in summary.shares("evaluated").items():
        _line(f"{share:.0%} of all steps computed: {name}", console)
    _failures(summary.failures, summary.failed, "in status.jsonl", console)
    if summary.blocked is not None:
        _line(f"stopped: {summary.blocked}", console)
    if summary.left or summary.failed:
        _line("the same command makes what is not done", console)


def show_status(status: Status, console: Console) -> None:
    """Counts, and why rows failed."""
    _line(f"{status.path}: {_rows(status.rows)} of {status.manifest}", console)
    _line(f"{status.done:,} done, {status.failed:,} failed, {status.left:,} left", console)
    if status.others:
        _line(f"{status.others:,} videos are of rows that the manifest has no more", console)
    if status.refused:
        _line(f"{_rows(status.refused)} of the manifest cannot run", console)
    _failures(status.failures, len(status.failures), "which --json tells", console)


def _failures(failures: Iterable[Failure], count: int, others: str, console: Console) -> None:
    shown = list(failures)[:_MOST_LINES]
    for it in shown:
        _line(f"  {it}", console)
    if count > len(shown):
        _line(f"  and {count - len(shown):,} more, {others}", console)


def foretold(batch: Batch) -> dict[str, Any]:
    """What a batch would make, as plain values."""
    return {
        "output": str(batch.store.path),
        "rows": batch.rows,
        "before": batch.before,
        "left": len(batch.pending),
        "groups": {words(group): count for group, count in batch.groups()},
        "refused": [{"line": it.line, "why": it.why, "rows": it.rows} for it in batch.refused],
    }


def show_foretold(batch: Batch, console: Console) -> None:
    """The same in words."""
    before = f", {batch.before:,} done before" if batch.before else ""
    _line(f"{batch.store.path}: {_rows(batch.rows)}{before}; would make", console)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for group, count in batch.groups():
        table.add_row(Text(f"{count:,}", justify="right"), Text(words(group)))
    console.print(table if batch.pending else "  nothing", highlight=False)
    for it in batch.refused[:_MOST_LINES]:
        rows = f" ({it.rows} rows)" if it.rows > 1 else ""
        _line(f"cannot run: line {it.line}: {it.why}{rows}", console)
    if len(batch.refused) > _MOST_LINES:
        _line(f"and {len(batch.refused) - _MOST_LINES:,} more that cannot run", console)


def duration(seconds: float) -> str:
    """Seconds in words, as `34 s`, `5 min 10 s` or `8 h 2 min`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def _line(text: str, console: Console) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
