"""Processes that make one thing together, over gloo on the CPU, and stay for several tests."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

_TIMEOUT_S = 240


class Gang:
    """`count` processes, each a rank; `run` calls a function of a module in all of them."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        place = f"file://{self._folder.name}/store"
        self._ends: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, place), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What it returns in each rank; raises where it raises in any."""
        code: Any = function.__code__
        for end in self._ends:
            end.send((code.co_filename, function.__name__, args))
        found: list[Any] = []
        failures: list[str] = []
        for rank, end in enumerate(self._ends):
            assert end.poll(_TIMEOUT_S), f"rank {rank} does not answer"
            ok, value = end.recv()
            found.append(value)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        assert not failures, "\n".join(failures)
        return found

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _serve(end: Any, rank: int, count: int, place: str) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    distributed.init_process_group("cpu:gloo", init_method=place, rank=rank, world_size=count)
    while True:
        try:
            file, name, args = end.recv()
        except EOFError:
            return
        path = Path(file)
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        try:
            end.send((True, getattr(importlib.import_module(path.stem), name)(*args)))
        except BaseException:
            end.send((False, traceback.format_exc()))
