"""``python -m forebay_server``: see :mod:`forebay_server.cli`."""

import sys

from forebay_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
