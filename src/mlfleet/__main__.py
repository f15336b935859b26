"""``python -m mlfleet``."""

import sys

from mlfleet._cli import main

sys.exit(main())
