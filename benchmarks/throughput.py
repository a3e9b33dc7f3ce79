"""How many videos an hour: `kinora batch` beside a loop of `kinora generate`, as whole commands.

    python benchmarks/throughput.py [--rows 200] [--loop 10] [--size 128x128] [--json FILE] [-- …]

Both make the same prompts of `kinora-tiny` with the same seeds; a loop starts Python, imports and
loads the model for each video, a batch once for each worker. Of a loop, which goes on alike, only
the first `--loop` videos are made. What stands behind `--` goes to the batch, as `--workers 4`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny_quality import Group

KINORA = [sys.executable, "-m", "kinora.app"]


def ran(*arguments: str) -> float:
    """Seconds that a command took, which must succeed."""
    began = time.perf_counter()
    done = subprocess.run([*KINORA, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        told = f"ended with {done.returncode}:\n{done.stderr}"
        raise SystemExit(f"kinora {' '.join(arguments)} {told}")
    return time.perf_counter() - began


def hashes(folder: Path) -> set[str]:
    """Of the frames of all videos below `folder`, before they were coded."""
    sidecars = (json.loads(it.read_text()) for it in folder.rglob("*.json"))
    return {it["frames_sha256"] for it in sidecars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--loop", type=int, default=10)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--format", default="mp4")
    parser.add_argument("--json", type=Path, help="a JSON line is added to it")
    parser.add_argument("given", nargs="*", help="options of the batch")
    asked = parser.parse_args()
    # Two seeds of each prompt: there are 173 in the test split.
    prompts = [it for it, _ in Group("throughput", "test", 1, 0).prompts((asked.rows + 1) // 2)]
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        manifest = root / "prompts.jsonl"
        rows = [{"prompt": it, "seed": seed} for seed in (0, 1) for it in prompts][: asked.rows]
        manifest.write_text("".join(json.dumps(it) + "\n" for it in rows))
        size = ("--size", asked.size, "--format", asked.format)
        batch = ran("batch", str(manifest), "--output", str(root / "batch"), *size, *asked.given)
        loop = 0.0
        for index, row in enumerate(rows[: asked.loop]):
            to = str(root / "loop" / f"{index}.{asked.format}")
            given = ("--seed", str(row["seed"]), "--output", to)
            loop += ran("generate", str(row["prompt"]), *given, *size)
        made, alone = hashes(root / "batch"), hashes(root / "loop")
        cuda = torch.cuda.is_available()
        machine = torch.cuda.get_device_name() if cuda else platform.processor() or "cpu"
        told = {
            "rows": len(rows),
            "size": asked.size,
            "given": asked.given,
            "batch_s": round(batch, 2),
            "batch_s_a_row": round(batch / len(rows), 3),
            "loop_s_a_row": round(loop / asked.loop, 3),
            "ratio": round(loop / asked.loop / (batch / len(rows)), 2),
            "files": len(made),
            "equal": len(made & alone),
            "looped": asked.loop,
            "gpus": torch.cuda.device_count(),
            "machine": machine,
            "torch": torch.__version__,
        }
        print(json.dumps(told))
        if asked.json:
            with asked.json.open("a") as file:
                file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
