"""Many requests at once: rows of a manifest, a folder that knows which are done, engines.

    manifest ─► rows ─► table ─► store (what is done) ─► schedule ─► engine ─► files, summary

`prepare` reads everything and refuses what can be refused; `run` makes what is left.
"""

from __future__ import annotations

from .run import Batch, Options, prepare, run

__all__ = ["Batch", "Options", "prepare", "run"]
