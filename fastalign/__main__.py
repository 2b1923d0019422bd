"""`python -m fastalign`: the command line."""

from fastalign.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
