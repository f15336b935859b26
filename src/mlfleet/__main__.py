"""``python -m mlfleet``."""

import sys

from mlfleet.cli import main

sys.exit(main())
