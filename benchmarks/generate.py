"""Time to video by stage, cold and warm, with the judge's verdict on what came out.

    python benchmarks/generate.py [--runs 3] [--size WxH] [--steps N] [--json FILE]

Cold is a new process, from the command line to the file; warm repeats a request on a loaded model.
Each figure is the median over the runs, which differ in their seed. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kinora.eval.world import ALL_CORRECT, judge
from kinora.pipelines.events import STAGES
from kinora.pipelines.generate import generate
from kinora.pipelines.media import read_frames
from kinora.pipelines.models import Shelf
from kinora.pipelines.request import Request
from kinora.pipelines.run import Run

PROMPT = "a red circle moving left over a black background"


def cold(arguments: Sequence[str]) -> dict[str, Any]:
    """One run of the command line in a new process; seconds by stage, `total` and `process`."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "kinora.app", "generate", *arguments, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    spent_s = time.perf_counter() - began
    run = json.loads(done.stdout.splitlines()[-1])
    return {
        **run["stages_s"],
        "total": run["total_s"],
        "process": spent_s,
        "path": run["outputs"][0]["path"],
    }


def warm(request: Request, shelf: Shelf) -> dict[str, Any]:
    """One run in this process on the model that `shelf` holds."""
    began = time.perf_counter()
    *_, run = generate(request, shelf=shelf)
    assert isinstance(run, Run)
    spent_s = time.perf_counter() - began
    return {
        **run.stages_s,
        "total": run.total_s,
        "process": spent_s,
        "path": run.outputs[0].path,
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Medians by column for each kind of run."""
    columns = (*STAGES, "total", "process", "correct")
    return {
        kind: {column: statistics.median(run[column] for run in runs) for column in columns}
        for kind, runs in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prompt", default=PROMPT, help="a caption of the world")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", help="WxH in pixels")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings: dict[str, Any] = {}
    if options.size:
        settings["width"], settings["height"] = map(int, options.size.split("x"))
    if options.steps:
        settings["steps"] = options.steps
    flags = [f"--size={options.size}"] if options.size else []
    flags += [f"--steps={options.steps}"] if options.steps else []
    rows: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.runs):
            where = ["--seed", str(seed), "--output", str(Path(folder) / "cold")]
            rows["cold"].append(cold([options.prompt, *where, *flags]))
        shelf = Shelf()
        for seed in range(-1, options.runs):
            request = Request(
                prompt=options.prompt,
                seed=max(seed, 0),
                output=str(Path(folder) / "warm"),
                **settings,
            )
            run = warm(request, shelf)
            if seed >= 0:  # the first only loads the model
                rows["warm"].append(run)
        for run in (run for runs in rows.values() for run in runs):
            score = judge(read_frames(Path(run["path"])), options.prompt)[ALL_CORRECT]
            run["correct"] = score or 0.0
            run["path"] = Path(run["path"]).name
    medians = table(rows)
    print(" ".join(f"{name:>9}" for name in ("", *medians["cold"])))
    for kind, values in medians.items():
        print(f"{kind:>9}", *(f"{value:9.2f}" for value in values.values()))
    report = {
        "prompt": options.prompt,
        **settings,
        "python": platform.python_version(),
        "medians_s": medians,
        "runs": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
