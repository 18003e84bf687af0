"""``python -m sparseflow``."""

import sys

from .cli import main

sys.exit(main())
