"""Makes the views of a file of cases by the extension at a path: run as a process, perhaps with a sanitizer.

Neither torch nor Pillow is imported, so that what a sanitizer finds is ours.
"""

import importlib.util
import sys

import numpy as np


def main(extension: str, cases: str) -> None:
    spec = importlib.util.spec_from_file_location("_fast", extension)
    fast = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fast)
    stored = np.load(cases)
    count = 0
    while f"{count} pixels" in stored:
        pixels, boxes, params, turns = (stored[f"{count} {name}"] for name in ("pixels", "boxes", "params", "turns"))
        wanted = [stored[f"{count} view {v}"] for v in range(len(boxes))]
        for level in range(len(fast.LEVELS)):
            # Memory of its own for each, so that its ends are watched.
            views = [np.zeros_like(view) for view in wanted]
            fast.make_views(pixels.copy(), boxes, params, turns, views, level)
            for v, (view, want) in enumerate(zip(views, wanted, strict=True)):
                assert np.array_equal(view, want), (count, v, fast.LEVELS[level])
        count += 1
    print(f"{count} cases by {', '.join(fast.LEVELS)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
