"""``python -m medclr`` is ``medclr``."""

from medclr.cli import main

main()
