"""The only packaging metadata of fastdino; tool settings are in pyproject.toml."""

import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path("fastdino/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# Views by C, see fastdino/data/views/fast.py. Optional: where it does not compile, Pillow makes the same pixels.
C_FILES = sorted(str(path) for path in Path("fastdino/data/views").glob("fast*.[ch]"))
DIGEST = zlib.crc32(b"".join(Path(file).read_bytes() for file in C_FILES))
FAST_VIEWS = Extension(
    "fastdino.data.views._fast",
    ["fastdino/data/views/fast.c"],
    depends=C_FILES,
    define_macros=[("SOURCES", f'"{DIGEST:08x}"')],
    # Last on the command line, so before all else that a user sets: a fused multiply-add would change pixels.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)

setup(
    name="fastdino",
    version=VERSION,
    description="Trainer for DINO: fused Triton kernels, ZeRO with a sharded teacher, throughput gates",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["fastdino", "fastdino.*"])
    + find_packages("kernels", include=["fastdino_kernels", "fastdino_kernels.*"]),
    package_dir={"fastdino_kernels": "kernels/fastdino_kernels"},
    ext_modules=[FAST_VIEWS],
    package_data={"fastdino": ["py.typed", "data/views/*.[ch]", "data/views/*.pyi"], "fastdino_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11,<2.13",
        'triton>=3.6; platform_system == "Linux"',
        "deepspeed==0.19.8",  # the one of fastdino/engine/zero.py
        "xformers>=0.0.34,<0.0.36",
        "timm>=1.0.20",
        "torchvision>=0.26",  # which timm brings: the random views of fine-tuning
        "numpy>=2",
        "pillow>=11.3",
        "fsspec>=2024.6",
        "pyyaml>=6",
        "safetensors>=0.5",
        "simplejpeg>=1.9",
        "tyro>=1.0",
        "tqdm>=4.66",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
    ],
    extras_require={
        "bench": [  # Triton losses with dense targets that bench/kernels measures beside ours on a GPU
            "fla-core>=0.6",
            "liger-kernel>=0.8",
        ],
        "eval": ["scikit-learn>=1.7", "scipy>=1.13"],  # the kinds of fastdino eval that solve, cluster or match
        "parquet": ["pyarrow>=16"],  # --data.root of .parquet, and of a folder of datasets.save_to_disk
        "hf": ["pyarrow>=16", "huggingface_hub"],  # also --data.root hf://datasets/...
        "tiff": [
            "tifffile>=2026.3",
            "imagecodecs>=2026.3",
        ],  # images of data.channels other than 1 and 3, and of floats
        "monitoring": [  # run.prometheus, run.wandb, clocks of GPUs
            "nvidia-ml-py>=12",
            "prometheus-client>=0.20",
            "wandb>=0.18",
        ],
        "http": ["fsspec[http]>=2024.6"],  # --data.root https://...; other stores name their package when they are used
        "onnx": ["onnx>=1.19", "onnxscript>=0.5"],  # fastdino export --format onnx
        "dev": [
            "datasets>=4",  # what writes the folders that are read
            "fsspec[http]>=2024.6",
            "imagecodecs>=2026.3",
            "kornia>=0.8",  # peers that bench/ measures beside us
            "lightly>=1.6",
            "mypy",
            "onnx>=1.19",
            "onnxruntime>=1.22",  # what judges the graphs that are written
            "onnxscript>=0.5",
            "prometheus-client>=0.20",
            "pyarrow>=16",
            "pytest",
            "pytest-benchmark[histogram]>=5.2",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "scikit-learn>=1.7",
            "scipy>=1.13",
            "tifffile>=2026.3",
            "transformers>=5,<6",  # Hugging Face's classes, whose weights are read and written
            "wandb>=0.18",
        ],
    },
    entry_points={"console_scripts": ["fastdino = fastdino.cli:main"]},
)
