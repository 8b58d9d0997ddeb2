"""Every kernel beside its reference, torch.compile and the best public alternative.

Correct first, then timed. ``python -m bench.kernels`` writes bench/results/kernels-DEVICE.json, in pytest-benchmark's
format. On a GPU these are the kernels; on a CPU the references, which is what a CPU runs. ``--sweep`` measures over
sizes and writes bench/results/sweep-DEVICE.json, which ``python -m bench.plots`` draws.
"""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from bench.kernels.measure import OPERATIONS
from bench.kernels.sweep import SWEEPS
from bench.record import ROOT, add, may_add, provenance, result_path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--only", choices=OPERATIONS, help="one operation; is added to a file of the same code")
    parser.add_argument("--shape", nargs="+", default=[], help="instead of the usual ones, such as 10,2,64,65536,bf16")
    parser.add_argument("--rounds", type=int, help="pairs of measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--sweep", action="store_true", help="over sizes, the operations that have a sweep")
    parser.add_argument("--out", type=Path, help="default: as above, if nothing is left out")
    options = parser.parse_args()
    if options.shape and (options.sweep or not options.only):
        parser.error("--shape is of one operation, which --only names, and in place of --sweep")
    if options.sweep and options.only not in (None, *SWEEPS):
        parser.error(f"--sweep: {options.only} has no sizes in bench/kernels/sweep.py")
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    path, out = result_path("sweep" if options.sweep else "kernels", device), options.out
    here = provenance(device, "bench.kernels")
    whole = not (options.shape or options.no_compile)
    if out is None and whole and (not options.only or (not options.rounds and may_add(path, "machine_info", here))):
        out = path.with_suffix(".part")
        out.parent.mkdir(parents=True, exist_ok=True)
    arguments = [f"--{key}={value}" for key, value in (("only", options.only), ("rounds", options.rounds)) if value]
    arguments += [f"--shapes={' '.join(options.shape)}", f"--device={device}"]
    arguments += ["--no-compile"] if options.no_compile else []
    arguments += ["--sweep"] if options.sweep else []
    arguments += [f"--benchmark-json={out}"] if out else []
    code = pytest.main(
        [str(Path(__file__).parent / "bench_kernels.py"), f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-q", "-rs",
         "-o", "python_functions=bench_*", "-o", "timeout=0", "--benchmark-group-by=group",
         "-W", "ignore:Benchmark fixture was not used",
         "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname", *arguments]
    )  # fmt: skip
    if out == path.with_suffix(".part"):
        keep(out, path, bool(options.only))
    return code


def keep(part: Path, path: Path, only: bool) -> None:
    """Makes the finished file ``part`` the result file, or with ``only`` its operation a part of it.

    pytest-benchmark empties its file when it starts, and leaves it so when nothing was measured.
    """
    if part.stat().st_size:
        document = json.loads(part.read_text())
        if not only:
            path.unlink(missing_ok=True)
        add(path, document, "machine_info", "benchmarks", lambda entry: entry["group"].split()[0])
    part.unlink()


if __name__ == "__main__":
    sys.exit(main())
