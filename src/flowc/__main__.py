"""`python -m flowc` is the command `flowc`."""

from flowc.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
