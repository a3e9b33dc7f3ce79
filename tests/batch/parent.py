"""A batch of the stand-in, to be killed: parent.py MANIFEST OUTPUT WORKERS [ENGINE]."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from standin import StandIn

from kinora.pipelines.batch import Options, prepare, run
from kinora.pipelines.batch.report import Summary


def main() -> int:
    """The exit status says whether all is done."""
    manifest, output, workers, *engine = sys.argv[1:]
    options = Options(Path(manifest), Path(output), {"steps": 3}, retries=100, device="cpu",
                      workers=int(workers), engine=engine[0] if engine else "local")  # fmt: skip
    *_, last = run(prepare(options, lambda _: None), make=StandIn)
    return 0 if isinstance(last, Summary) and last.complete else 1


if __name__ == "__main__":
    sys.exit(main())
