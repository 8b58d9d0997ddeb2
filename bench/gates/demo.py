"""What the demo learns: k-NN accuracy, where its attention lies, and what its patches know of their class.

``python -m bench.gates.demo --seeds 0 1 2`` runs the demo once for each seed and records bench/results/demo.json.
``--trial "--loss.patch-weight 0.3"`` trains with other settings instead and adds their figures to the file; the flags
are those of ``fastdino train``. Runs that are there go on.
"""

import sys
from pathlib import Path

import torch

from bench.gates.trials import Case, arguments, record
from bench.record import RESULTS
from fastdino.cli import configured
from fastdino.demo import run_demo
from fastdino.eval import PatchProbe, Subject
from fastdino.training.export import run_backbone


def main() -> int:
    parser = arguments("demo", __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json", help="the file of results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the demo does
    return record("demo", options, options.out, list, trial)


def trial(flags: list[str], seed: int, folder: Path) -> list[Case]:
    """Figures of the demo with ``flags``, see :func:`fastdino.demo.run_demo` and :class:`fastdino.eval.PatchProbe`."""
    config = configured("demo", ["--run.dir", str(folder), "--run.seed", str(seed), *flags])
    found = run_demo(config)
    probe = PatchProbe()(Subject(run_backbone(folder)[0], config, folder)).write(folder)
    return [{"features": "teacher", **found, **{key: score["value"] for key, score in probe["scores"].items()}}]


if __name__ == "__main__":
    sys.exit(main())
