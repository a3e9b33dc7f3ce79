"""`python -m kinora.app`."""

import sys

from .cli import main

sys.exit(main())
