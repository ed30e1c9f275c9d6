"""The command's entry: Ctrl-C while the libraries load is one line too."""

import sys


def main() -> None:
    try:
        from pipeline.cli import main as run

        run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)  # noqa: T201
        sys.exit(130)


if __name__ == "__main__":
    main()
