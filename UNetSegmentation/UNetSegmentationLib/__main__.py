"""`unetseg` and `python -m UNetSegmentationLib`."""

import sys


def main() -> None:
    try:
        from .cli import main as run  # up to a second of imports, in which Ctrl-C would end in a traceback

        run()
    except KeyboardInterrupt:
        print("unetseg: cancelled.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
