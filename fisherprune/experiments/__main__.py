"""``python -m fisherprune.experiments``."""

import sys

from fisherprune.experiments.cli import main

sys.exit(main())
