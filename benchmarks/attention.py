"""`kinora bench attention` by another name: times block attention beside what others offer.

python benchmarks/attention.py [--shape 12x32768x128] [--tile 128x64] [--json FILE]
"""

import sys

from kinora.app.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))
