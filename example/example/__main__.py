"""``python -m example COMMAND``: Django's management commands with this site's settings."""

import os
import sys

from django.core.management import execute_from_command_line


def main() -> None:
    """Run the command given on the command line."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example.settings")
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
