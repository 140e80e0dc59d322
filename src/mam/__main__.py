"""The command: `mam`, or `python -m mam` where its script is not on the path."""

import sys

from mam.runs.signals import listen


def main() -> int:
    """Run the command.

    Training listens to signals before anything heavy is imported, and until its last moment.
    """
    if sys.argv[1:2] == ["train"]:
        listen()
    from mam.cli import main as cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
