"""`python -m audioldm2` is the command line."""

import sys

from audioldm2.cli import main

sys.exit(main())
