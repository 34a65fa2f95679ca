"""``python -m mergekit_act`` is the command ``mergekit-act``."""

from mergekit_act.cli import main

if __name__ == "__main__":
    main(prog_name="mergekit-act")
