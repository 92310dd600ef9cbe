"""The command: python -m tsp_utils COMMAND. The only module that prints."""

import sys

from tsp_utils import environment


def main(arguments) -> int:
    if arguments == ["setup"]:
        environment.set_up()
        return 0
    print("usage: python -m tsp_utils setup")
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        sys.exit(f"error: {error}")
