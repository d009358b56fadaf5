"""`python -m ddistill` is the command `ddistill`."""

import sys

from ddistill.cli import main

sys.exit(main())
