"""Drawing on the terminal: progress on stderr, results on stdout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from ..accel.presets import MEASURED
from ..pipelines.cards import Card
from ..pipelines.events import STAGES, Notice
from ..pipelines.events import Progress as Step
from ..pipelines.memory import amount
from ..pipelines.run import Run

if TYPE_CHECKING:
    from ..accel.facts import Facts
    from ..accel.recipe import Recipe
    from ..pipelines.planning import Plan

_MARK = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


def follow(events: Iterable[Step | Notice | Run], console: Console) -> Run:
    """Show progress on `console` until the run is there, and return it."""
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[times]}", style="dim"),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bars.add_task("starting", total=None, count="", times="")
    with bars:
        for event in events:
            if isinstance(event, Run):
                return event
            if isinstance(event, Notice):
                console.print(f"note: {event.text}", style="yellow", markup=False, soft_wrap=True)
            elif console.is_terminal:
                _show(bars, task, event)
            else:
                _tell(console, event)
    raise RuntimeError("the run ended without a result")


def _show(bars: Progress, task: TaskID, event: Step) -> None:
    which = f" {event.video} of {event.videos}" if event.videos > 1 else ""
    times = f"{event.elapsed_s:.0f} s"
    if event.eta_s is not None:
        times += f", about {event.eta_s:.0f} s left"
    bars.update(
        task,
        description=f"{event.doing}{which}",
        total=event.steps or None,
        completed=event.step,
        count=f"step {event.step}/{event.steps}" if event.steps else "",
        times=times,
    )


def _tell(console: Console, event: Step) -> None:
    """Plain lines where stderr is a file: each stage, and about every tenth of the steps."""
    if event.steps and event.step % max(1, event.steps // 10) and event.step != event.steps:
        return
    which = f" [{event.video}/{event.videos}]" if event.videos > 1 else ""
    count = f" step {event.step}/{event.steps}" if event.steps else ""
    left = "" if event.eta_s is None else f", about {event.eta_s:.0f} s left"
    line = f"{event.doing}{which}{count} ({event.elapsed_s:.1f} s{left})"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_run(run: Run, console: Console) -> None:
    """Paths first, one a line, then what each stage took."""
    for output in run.outputs:
        console.print(str(output.path), markup=False, highlight=False, soft_wrap=True)
        if output.latents is not None:
            told = f"latents: {output.latents}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)
        if output.identical is not None:
            told = (
                "identical to the original, bit for bit"
                if output.identical
                else ("differs from the original")
            )
            console.print(told, highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for stage in STAGES:
        table.add_column(stage, justify="right")
    table.add_column("total", justify="right")
    table.add_row(*(f"{run.stages_s[stage]:.2f} s" for stage in STAGES), f"{run.total_s:.2f} s")
    console.print(table)
    receipts = [output.receipt for output in run.outputs if output.receipt is not None]
    for line in dict.fromkeys(line for receipt in receipts for line in receipt.words()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_plan(plan: Plan, console: Console) -> None:
    """What a run would do: size, memory, and each part of its recipe with a verdict."""
    request, table = plan.request, Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    size = f"{request.width}x{request.height}, {request.frames} frames, {request.steps} steps"
    _row(table, "run", f"{request.model}, {size}, {request.device}, {request.dtype}")
    _row(table, "tokens", f"{plan.tokens:,}")
    fits = "fits" if plan.memory.peak <= plan.free_bytes else "does not fit"
    _row(
        table,
        "memory",
        f"{amount(plan.memory.peak)} at the peak ({plan.memory.explain()}); "
        f"{amount(plan.free_bytes)} free: it {fits}",
    )
    if not plan.parts:
        _row(table, "recipe", "nothing accelerated: the stock pipeline")
    for part in plan.parts:
        _row(table, part.part, f"{part.verdict}: {part.asked}")
        _row(table, "", part.why)
        if part.speedup is not None:
            _row(table, "", f"predicted: denoising {part.speedup:.2f} times as fast")
    if plan.together is not None:
        least, most = (f"{it:.2f}" for it in plan.together)
        times = least if least == most else f"{least} to {most}"
        _row(table, "together", f"predicted: denoising {times} times as fast")
    console.print(table, highlight=False)


def show_recipes(recipes: list[Recipe], console: Console) -> None:
    """The presets as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "for", "what", "speed", "cost in quality"):
        table.add_column(heading, no_wrap=heading in ("name", "speed"))
    for recipe in recipes:
        told = MEASURED[recipe.name]
        _row(table, recipe.name, recipe.title, recipe.words(), told.speed, told.cost)
    console.print(table)
    told = "Measured on kinora-tiny (--json says where); `kinora recipes show NAME` prints a file."
    console.print(told, style="dim")


def show_methods(methods: list[Facts], console: Console) -> None:
    """The attention methods as a table."""
    _show_named(methods, "methods", console)
    from ..accel.wrappers import WRAPPERS  # torch, which other commands do without

    around = ", ".join(it.name for it in WRAPPERS)
    console.print(f"Around any of them: {around}.", style="dim")


def show_policies(policies: list[Facts], console: Console) -> None:
    """The step policies as a table."""
    _show_named(policies, "policies", console)


def _show_named(known: list[Facts], group: str, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "arXiv", "what"):
        table.add_column(heading, no_wrap=heading == "name")
    for it in known:
        _row(table, it.name, "\n".join(it.papers), it.short)
    console.print(table)
    console.print(f"`kinora {group} show NAME` tells more.", style="dim")


def show_facts(method: Facts, console: Console) -> None:
    """Everything written about one method or policy."""
    rows = {
        "name": method.name,
        "rule": "\n".join(method.rule),
        "paper": ", ".join(f"https://arxiv.org/abs/{it}" for it in method.papers),
        "source": method.source,
        **{f"not as {name}": told for name, told in method.differs.items()},
        "licence": method.terms,
        "use it": f"where {method.use_when}",
    }
    if not method.licence:  # it is ours
        del rows["paper"], rows["licence"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, told in rows.items():
        _row(table, name, told)
    for it in method.options:
        _row(table, it.name, f"{it.help}: {it.allowed()} [default: {it.default!r}]")
    console.print(table, highlight=False)


def show_models(cards: list[Card], console: Console) -> None:
    """The registry as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "makes", "default", "download", "memory", "licence"):
        table.add_column(heading, no_wrap=heading == "name")
    for card in cards:
        size = f"{card.width}x{card.height}"
        default = size if card.kind == "image" else f"{size}, {card.frames} frames"
        _row(
            table,
            card.name,
            card.kind,
            default,
            "with Kinora" if card.repo is None else _gb(card, "download_gb"),
            _gb(card, "memory_gb"),
            card.licence,
        )
    console.print(table)
    console.print("~ estimated. `kinora models show NAME` tells more.", style="dim")


def show_card(card: Card, words: list[str] | str, where: str, console: Console) -> None:
    """Everything known about one model. `words` is its vocabulary, or a remark in its place."""
    rows = {
        "what": card.title,
        "pipeline": card.pipeline,
        "repository": card.repo or "",
        "licence": card.licence,
        "parameters": "" if card.params_b is None else f"{card.params_b:g} billion (denoiser)",
        "download": _gb(card, "download_gb"),
        "memory": _gb(card, "memory_gb"),
        "weights": where,
        "default": f"{card.width}x{card.height}, {card.frames} frames at {card.fps:g} fps, "
        f"{card.steps} steps, guidance {card.guidance:g}"
        if card.kind == "video"
        else f"{card.width}x{card.height}, {card.steps} steps, guidance {card.guidance:g}",
        "sizes": card.size_rule(),
        "lengths": card.frames_rule(),
        "trained": card.trained_range(),
        "tokens": f"{card.grid(card.width, card.height, card.frames).tokens:,} at the default",
        "note": card.note,
        "estimated": ", ".join(card.estimates),
        "words": words if isinstance(words, str) else " ".join(words),
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    _row(table, "name", card.name)
    for name, text in rows.items():
        if text:
            _row(table, name, text)
    console.print(table, highlight=False)


def show_findings(findings: list[tuple[str, str, str]], console: Console) -> None:
    """One line a finding: verdict, subject, text."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for verdict, subject, text in findings:
        table.add_row(Text(verdict, style=_MARK[verdict]), Text(subject), Text(text))
    console.print(table, highlight=False)


def _row(table: Table, *cells: str) -> None:
    """Add cells as they are: square brackets are no markup here."""
    table.add_row(*(Text(cell) for cell in cells))


def _gb(card: Card, field: str) -> str:
    value = card.download_gb if field == "download_gb" else card.memory_gb
    if value is None:
        return ""
    return f"{'~' if field in card.estimates else ''}{value:g} GB"
