"""The command line `python -m augsub --list [pattern]`."""

from .survey import main

if __name__ == "__main__":
    main()
