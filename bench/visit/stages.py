"""What a visit runs, in order of value. A stage is a command that could be typed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

PYTEST = (  # why a test failed it says at its end, and when it is interrupted, but not when its stage is stopped
    "timeout --foreground --signal=INT {end} "
    "python -m pytest -vv -p no:cacheprovider --timeout=180 --tb=short --show-capture=no -rfE"
)
TRAIN = (
    "python -m fastdino train vit_small_16 --run.dir {work}/run --data.root shapes --data.num-images 1024 "
    "--data.num-workers 4 --run.local-batch 64 --run.epochs 1 --run.knn-every 1 --optim.warmup-epochs 0"
)
ABLATION = (
    # what bench.step does not turn off; each variant is built and compiled anew
    "python -m fastdino bench vit_small_16 --data.root shapes --data.num-images 4096 --seconds 1 "
    "--json {out}/ablation.json --ablate model.attention engine.teacher_stream engine.checkpointing"
)
LARGE = (  # the peer's blocks are compiled one by one, which takes minutes
    "python -m bench.step --arch vit_large:32 --when {turn} "
    "--contender 'fastdino, attention by SDPA' 'lightly + timm, torch.compile'"
)
SANITIZER = (
    # with torch's cache of memory an access beyond a tensor's end would hit another tensor
    "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 --print-limit 20 --tool {tool} "
    "python -m tests.kernels.calls"
)
NCU = (
    "ncu --set full --page details --clock-control none --profile-from-start off --launch-count 12 --kill yes "
    "--kernel-name regex:^_[a-z_]+_kernel$ --force-overwrite --export {out}/ncu "
    "python -m bench.kernels --profile --no-compile --only dino_loss ibot_loss sinkhorn adamw_ema_ ema_update_"
)


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take.

    Attributes:
        command: split as a shell would. {seconds} is what a command that can end by itself may take, {end} when one has
            to be told that says at its end what it found, {work} a temporary folder, {out} the folder that is kept.
            One with {turn} begins early, beside others, to compile, and waits until that file is there, its turn.
        limit: seconds from its turn after which it is stopped, in a visit of default length; with less than a third
            left it is skipped.
        lane: stages of several lanes run side by side, before all that is timed; those of one lane one after another.
        shows: regular expression of the lines of its log that the summary repeats.
    """

    name: str
    command: str
    limit: int
    lane: str = ""
    shows: str = "."

    @property
    def early(self) -> bool:
        """Whether it begins before its turn."""
        return "{turn}" in self.command


MACHINE = r"^(GPU|Nvidia|CUDA|OS|CPU\(s\)|Python v|\[pip3\] (torch|triton|numpy))"
TESTED = r"\b(FAILED|ERROR)\b|\b(passed|failed|errors?) in\b"  # each as it comes: a stage may be stopped

STAGES = (
    Stage("tests", f"{PYTEST} -n 8 --dist worksteal -m 'not gpu and not large and not offline' tests/kernels", 150,
          "tests", TESTED),
    Stage("tests-gpu", f"{PYTEST} -n 6 --dist loadfile -m 'gpu and not large' -k 'not zero_3' tests", 150,
          "gpu tests", TESTED),
    Stage("tests-zero-3", f"{PYTEST} -m gpu -k zero_3 tests/training/test_gpu.py", 150, "ZeRO 3", TESTED),
    Stage("memcheck", SANITIZER.format(tool="memcheck"), 150, "memcheck", "SUMMARY|Invalid|Error"),
    Stage("racecheck", SANITIZER.format(tool="racecheck"), 150, "racecheck", "SUMMARY|hazard|Error"),
    Stage("train", TRAIN, 150, "training", "ZeRO|took|loss|k-NN|done"),
    Stage("machine", "python -m torch.utils.collect_env", 40, "compilers", MACHINE),
    # Fewest rounds, no file: it fills the compiler's cache while nothing can be timed.
    Stage("warm-kernels", "python -m bench.kernels --rounds 2 --seconds {seconds}", 110, "compilers", "no figure|left"),
    # Alone on the machine.
    Stage("ceilings", "python -m bench.kernels.ceilings", 20),
    Stage("step-vit_small", "python -m bench.step --arch vit_small --when {turn}", 70),
    Stage("attention", "python -m bench.kernels.attention", 60),
    Stage("profile", "python -m bench.visit.step_profile vit_small", 40),
    Stage("kernels", "python -m bench.kernels --seconds {seconds}", 120),
    Stage("step-vit_large", LARGE, 90),
    Stage("profile-large", "python -m bench.visit.step_profile vit_large:32", 90,
          shows=r"^vit|images/s|peak|launches|[1-9]\d\.\d%"),
    Stage("ablation", ABLATION, 110, shows=r"^ *(model|engine|all|alone|last|images/s|MFU)|images/s|skipped|%"),
    Stage("ncu", NCU, 90, shows=r"_kernel|Duration|DRAM Throughput|Registers Per|Achieved Occ|Local\(|profiled"),
    Stage("launch-configs", "python -m bench.visit.launch_configs", 90),
    Stage("tests-large", f"{PYTEST} -m large tests/kernels", 100, shows=TESTED),
)  # fmt: skip
SECONDS = 560
"""Default length: the tests and the stages up to ``step-vit_large`` fit, even if each takes all of its limit."""
SPARE = 10  # of it for the last report


def lanes(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages that run side by side, by lane; empty lists for no lane."""
    found: dict[str, list[Stage]] = defaultdict(list)
    for stage in stages:
        if stage.lane:
            found[stage.lane].append(stage)
    return list(found.values())


def longest(stages: Sequence[Stage]) -> int:
    """Seconds of a visit in which every stage takes all of its limit."""
    beside = max((sum(stage.limit for stage in lane) for lane in lanes(stages)), default=0)
    return SPARE + beside + sum(stage.limit for stage in stages if not stage.lane)


def stretch(stages: Sequence[Stage], seconds: float) -> float:
    """What the limits are multiplied with, so that they use up a visit that is longer than all of them."""
    return max(1.0, (seconds - SPARE) / (longest(stages) - SPARE))
