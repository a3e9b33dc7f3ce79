"""The report of an evaluation as HTML, from its JSON; everything in it is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...eval import markup

_STATES = {"ok": "ok", "partial": "in part", "skipped": "skipped", "failed": "failed"}
_NONE = "–"


def shown(report: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Totals, then each video; `names` are what videos are called, by their paths there."""
    if "dimensions" in report:
        return _vbench(report)
    known = report["provenance"]["metrics"]
    rows: list[list[str]] = []
    for name, it in report["totals"].items():
        told = f"<small>{escape(known[name]['what'])}</small>"
        over = f"{it['n']} of {it['asked']}" if it["asked"] else _NONE
        rows.append(
            [f"{_plain(name)}{told}", _number(it["mean"]), _span(it), over, _state(it["status"])]
        )  # fmt: skip
    parts = [markup.table(("metric", "mean", "95 % interval", "videos", "status"), rows)]
    parts.append(_reasons(report["totals"], report.get("rejected", ())))
    parts.append(_videos(report["clips"], names))
    return f'<div class="k-scores">{"".join(parts)}</div>'


def _vbench(report: Mapping[str, Any]) -> str:
    dimensions: Mapping[str, Any] = report["dimensions"]
    rows = [
        [_plain(name), _percent(it["score"]), _state(it["status"])]
        for name, it in dimensions.items()
    ]
    totals = {name: it for name, it in report["totals"].items() if name != "why"}
    rows += [[escape(name), _percent(it), ""] for name, it in totals.items()]
    why = report["totals"].get("why")
    told = f'<p class="k-facts">No total: {escape(str(why))}</p>' if why else ""
    table = markup.table(("dimension", "score, %", "status"), rows)
    reasons = _reasons(dimensions, report.get("rejected", ()))
    return f'<div class="k-scores">{table}{told}{reasons}</div>'


def _reasons(results: Mapping[str, Any], rejected: Sequence[Mapping[str, str]]) -> str:
    """Why something has no score and what must be known of what has, each once."""
    found: dict[str, list[str]] = {}
    notes: dict[str, None] = {}
    for name, it in results.items():
        if it.get("reason"):
            found.setdefault(it["reason"], []).append(_plain(name))
        notes |= dict.fromkeys(it.get("notes", ()))
    every = [*map(_plain, results)]
    lines = [
        f"<b>{'all' if names == every and every[1:] else _few(names)}</b>: {escape(why)}"
        for why, names in found.items()
    ]
    lines += [f"left out: {escape(it['reason'])}" for it in rejected]
    lines += [f"note: {escape(it)}" for it in notes]
    return _list(lines)


def _videos(clips: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """A row for each video, a column for each metric that any of them has a score of."""
    metrics = [
        name
        for name in (clips[0]["results"] if clips else ())
        if any(it["results"][name]["score"] is not None for it in clips)
    ]
    if not metrics:
        return ""
    rows: list[list[str]] = []
    for it in clips:
        called = escape(names.get(it["path"], it["path"]))
        rows.append([called, *(_score(it["results"][name]) for name in metrics)])
    table = markup.table(("video", *map(_words, metrics)), rows)
    return f"<details><summary>By video</summary>{table}</details>"


def _score(result: Mapping[str, Any]) -> str:
    why = escape(str(result.get("reason", "")))
    if result["score"] is not None and not why:
        return _number(result["score"])
    value = _NONE if result["score"] is None else _number(result["score"])
    return f'<span title="{why}">{value}</span>'


def _words(name: str) -> str:
    return name.removeprefix("world.").replace("_", " ")


def _plain(name: str) -> str:
    """A metric in words, as HTML."""
    return escape(_words(name))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 5 else ""
    return ", ".join(names[:4] if more else names) + more


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.2f}"


def _span(total: Mapping[str, Any]) -> str:
    low, high = total["low"], total["high"]
    if total["partial_mean"] is not None:  # which is not the mean
        return f"{_number(total['partial_mean'])} of those {total['n']}"
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _state(status: str) -> str:
    return f'<span class="k-state" data-state="{escape(status)}">{_STATES.get(status, "")}</span>'


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{it}</li>" for it in lines)
    return f'<div class="k-remark"><ul>{items}</ul></div>' if lines else ""
