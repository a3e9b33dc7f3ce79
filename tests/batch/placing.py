"""A place to run a batch in: rows in, summary and events out, made by the stand-in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from standin import StandIn

from kinora.pipelines.batch import Batch, Options, prepare, run
from kinora.pipelines.batch.attempt import Ended
from kinora.pipelines.batch.report import Standing, Summary
from kinora.pipelines.events import Notice


@dataclass
class Place:
    """A folder to work in, with a manifest and the folder of its batch."""

    root: Path
    manifest: Path
    output: Path
    standings: list[Standing] = field(default_factory=list[Standing])
    ended: list[Ended] = field(default_factory=list[Ended])
    notices: list[Notice] = field(default_factory=list[Notice])

    def write(self, *prompts: str) -> None:
        """Make the manifest one of these prompts."""
        self.manifest.write_text("".join(f"{prompt}\n" for prompt in prompts))

    def prepare(self, **options: Any) -> Batch:
        """Read it."""
        defaults = options.pop("defaults", {"steps": 3})
        refuses = options.pop("refuses", lambda _: None)
        asked: dict[str, Any] = {"workers": 1, "device": "cpu", **options}
        return prepare(Options(self.manifest, self.output, defaults, **asked), refuses)

    def run(self, make: Any = StandIn, **options: Any) -> Summary:
        """Run it to its end."""
        self.standings.clear()
        self.ended.clear()
        self.notices.clear()
        for event in run(self.prepare(**options), make=make):
            if isinstance(event, Summary):
                return event
            if isinstance(event, Standing):
                self.standings.append(event)
            elif isinstance(event, Ended):
                self.ended.append(event)
            else:
                self.notices.append(event)
        raise AssertionError("no summary")

    def made(self) -> dict[str, bytes]:
        """Contents of the videos, by their rows' names."""
        return {path.stem: path.read_bytes() for path in self.output.glob("*.mp4")}

    def statuses(self) -> list[dict[str, Any]]:
        """The lines of the status."""
        return [json.loads(it) for it in (self.output / "status.jsonl").read_text().splitlines()]

    def strays(self) -> list[str]:
        """Files that are neither results nor the batch's own."""
        ours = {"rows.jsonl", "status.jsonl"}
        names = sorted(it.name for it in self.output.iterdir() if it.name not in ours)
        done = {name[:-4] for name in names if name.endswith(".mp4")}
        return [
            it for it in names if it not in {f"{n}{s}" for n in done for s in (".mp4", ".json")}
        ]
