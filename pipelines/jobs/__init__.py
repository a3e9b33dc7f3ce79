"""Jobs that outlive whoever asked: a line on disk, and one worker process that makes them in turn.

    Request ─► Jobs.submit ─► store (SQLite) ─► line ─► the engine of batches ─► files, store

A job is one video: a row as batches have it, with an id of its own in the names of its files.
"""

from __future__ import annotations

from .jobs import Jobs
from .store import STATUSES, Job, Status
from .uploads import Uploads

__all__ = ["STATUSES", "Job", "Jobs", "Status", "Uploads"]
