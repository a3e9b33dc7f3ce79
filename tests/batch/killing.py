"""Runs a command again and again while its processes are killed, until nothing is left to do."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Container, Sequence
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


def actors_of(process: int) -> list[psutil.Process]:
    """The worker processes of a cluster of Ray that `process` has started."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        for child in psutil.Process(process).children(recursive=True):
            with suppress(psutil.Error):
                if "ray::Actor" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def gone(processes: Sequence[psutil.Process], seconds: float) -> bool:
    """Whether all have ended by then."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def run_killed(
    command: Sequence[str],
    kills: int,
    waits_s: tuple[float, float],
    seed: int,
    log: Path,
    *,
    workers: Callable[[int], list[psutil.Process]] = workers_of,
    parents: Container[int] | None = None,
) -> Kills:
    """Kill parent or worker at random moments, `kills` times; then let it end, with status 0.

    `workers` finds those of a parent. `parents` are the numbers of the kills, from 0, that are of
    parents; None: two of five are.
    """
    dice, made = random.Random(seed), Kills()
    while True:
        with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            while made.all < kills and process.poll() is None:
                time.sleep(dice.uniform(*waits_s))
                there = workers(process.pid)
                if process.poll() is not None:
                    break
                if not there and (parents is not None or dice.random() < 0.7):
                    continue  # it starts: seldom killed there, or little else would be
                at_random = not there or dice.random() < 0.4
                at_parent = at_random if parents is None else made.all in parents
                if at_parent:
                    process.kill()
                    made.parents += 1
                    process.wait()
                    assert gone(there, 40), "workers end themselves when their parent is killed"
                else:
                    with suppress(psutil.NoSuchProcess):
                        dice.choice(there).kill()
                        made.workers += 1
            status = process.wait()
        if status >= 0:
            assert status == 0, log.read_text()
            return made
