"""`kinora` and `python -m kinora.app`: Ctrl-C is one line even while Python still imports."""

import sys


def main() -> int:
    """Run the command line; returns its exit status."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        if "--json" in sys.argv:
            print('{"status": "stopped"}')
        return 130


if __name__ == "__main__":
    sys.exit(main())
