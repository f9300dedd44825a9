"""`python -m gradientspace` is the `gradientspace` command."""

import sys

from gradientspace.cli import main

sys.exit(main())
