"""Runs a command again and again while its processes are killed, until nothing is left to do."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class Kills:
    """How many were killed."""

    parents: int = 0
    workers: int = 0

    @property
    def all(self) -> int:
        """Of both."""
        return self.parents + self.workers


def workers_of(process: int) -> list[psutil.Process]:
    """The worker processes of a batch that `process` runs."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        for child in psutil.Process(process).children():
            with suppress(psutil.Error):  # it ends meanwhile
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def gone(processes: Sequence[psutil.Process], seconds: float) -> bool:
    """Whether all have ended by then."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def run_killed(
    command: Sequence[str], kills: int, waits_s: tuple[float, float], seed: int, log: Path
) -> Kills:
    """Kill parent or worker at random moments, `kills` times; then let it end, with status 0."""
    dice, made = random.Random(seed), Kills()
    while True:
        with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            while made.all < kills and process.poll() is None:
                time.sleep(dice.uniform(*waits_s))
                workers = workers_of(process.pid)
                if process.poll() is not None:
                    break
                if not workers and dice.random() < 0.7:
                    continue  # it starts: seldom killed there, or little else would be
                if workers and dice.random() < 0.6:
                    dice.choice(workers).kill()
                    made.workers += 1
                else:
                    process.kill()
                    made.parents += 1
                    process.wait()
                    assert gone(workers, 40), "workers end themselves when their parent is killed"
            status = process.wait()
        if status >= 0:
            assert status == 0, log.read_text()
            return made
