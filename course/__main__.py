"""`python -m course ...` is the same as `course ...`."""

import sys

from course.cli import main

if __name__ == "__main__":
    sys.exit(main())
