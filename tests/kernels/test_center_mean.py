"""center_mean: the kernel against float64, and what it refuses."""

import pytest
import torch
from torch import Tensor

from fastdino_kernels.losses import center_mean as module
from fastdino_kernels.losses.center_mean import center_mean, center_mean_reference
from fastdino_kernels.testing import assert_no_worse

# Triton's interpreter works with NumPy, which warns of its own conversions.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::Warning:triton.runtime.interpreter"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (T, B, K), in tiles of 16 rows and 64 columns: whole tiles, ragged both ways, one row, one element.
SHAPES = [(2, 16, 128), (2, 25, 200), (1, 49, 65), (1, 1, 300), (1, 1, 1)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"BLOCK_ROWS": 16, "BLOCK_K": 64, "num_warps": 1}
    monkeypatch.setattr(module, "launch_config", lambda num_prototypes: blocks)


def random_logits(shape: tuple[int, int, int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale + 0.5).to(dtype)


def check(teacher: Tensor) -> None:
    mean = center_mean(teacher)
    assert mean.dtype == torch.float32
    assert_no_worse(mean, center_mean_reference(teacher), teacher.double().mean((0, 1)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype, scale: float) -> None:
    check(random_logits(shape, dtype, scale))


@pytest.mark.parametrize("shape", [(2, 40, 100), (1, 3, 33000)], ids=str)
def test_kernel_with_its_own_blocks(shape: tuple[int, int, int]) -> None:
    check(random_logits(shape, torch.bfloat16))


@pytest.mark.usefixtures("small_blocks")
def test_strides() -> None:
    x = random_logits((2, 25, 208), torch.float32)
    check(x.transpose(0, 1).contiguous().transpose(0, 1))
    check(x[:, ::2, 3:203])
    check(x.mT.contiguous().mT)
    check(x[:1].expand(2, -1, -1))


@pytest.mark.usefixtures("small_blocks")
def test_sums_in_fp32() -> None:
    """In bf16 a sum of ones stops at 256."""
    assert torch.equal(center_mean(torch.ones(2, 400, 64, dtype=torch.bfloat16, device=DEVICE)).cpu(), torch.ones(64))


@pytest.mark.usefixtures("small_blocks")
def test_what_is_not_finite_shows() -> None:
    x = random_logits((2, 25, 200), torch.float32)
    x[1, 20, 130], x[0, 0, 3] = float("nan"), float("inf")
    assert (~torch.isfinite(center_mean(x))).nonzero().flatten().tolist() == [3, 130]


def test_float64_and_gradient() -> None:
    x = random_logits((2, 3, 70), torch.float32)
    assert center_mean(x.double()).dtype == torch.float64
    assert not center_mean(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.zeros(2, 0, 4), torch.zeros(2, 3, 4, dtype=torch.int32)])
def test_refusals(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floating-point logits \(T, B, K\).*got"):
        center_mean(x)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("shape", [(2, 64, 65536), (2, 33, 65537), (2, 1024, 4096), (1, 2049, 2**20)], ids=str)
def test_real_sizes(shape: tuple[int, int, int]) -> None:
    check(random_logits(shape, torch.bfloat16))
