"""``python -m rmsgd``: the command line where its script is not on the path."""

import sys

from rmsgd.cli import main

sys.exit(main())
