"""Has jobs of so many seconds made where it can be killed, until all are done.

    serving.py FOLDER JOBS SECONDS

Those that were submitted are told in FOLDER/submitted; those that came to nothing are retried, as a
person would.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from desks import ask
from standin import StandIn

from kinora.pipelines.jobs import Jobs
from kinora.pipelines.jobs.store import RETRIED


def main() -> int:
    """Zero once all are done."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    jobs = Jobs(folder, make=StandIn)
    jobs.start()
    with (folder / "submitted").open("a") as told:
        while True:
            known = jobs.jobs(limit=count + 1)
            for number in range(len(known), count):
                (job,) = jobs.submit(ask(f"sleep {sys.argv[3]}", seed=number))
                told.write(f"{job.id}\n")
                told.flush()
                os.fsync(told.fileno())
            known = jobs.jobs(limit=count + 1)
            if all(it.status == "done" for it in known):
                jobs.close()
                return 0
            for job in known:
                if job.status in RETRIED:
                    jobs.retry(job.id)
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
