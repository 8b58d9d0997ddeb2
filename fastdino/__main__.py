"""``python -m fastdino`` and ``torchrun -m fastdino``: the same as the command ``fastdino``."""

from fastdino.cli import main

if __name__ == "__main__":
    main()
