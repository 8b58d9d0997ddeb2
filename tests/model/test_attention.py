"""Attention over packed sequences: against the mask written out, and what is asked of xformers."""

import importlib
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdino.config import ConfigError
from fastdino.model import attention as room
from fastdino.model.attention import attention

KEYS = ((4, 5), (3, 2), (1, 7))  # groups of different lengths and counts, so that a mixed-up order shows
CLS = tuple((sequences, 1) for sequences, _ in KEYS)


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(queries: room.Lengths, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Heads:
    torch.manual_seed(0)
    sizes = [sum(s * n for s, n in lengths) for lengths in (queries, KEYS, KEYS)]
    q, k, v = (torch.randn(1, n, 2, 16, device=device, dtype=dtype, requires_grad=True) for n in sizes)
    return q, k, v


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: room.Lengths) -> torch.Tensor:
    """The definition: full softmax with minus infinity between sequences."""
    owners = []
    for lengths in (queries, KEYS):
        tokens = [n for s, n in lengths for _ in range(s)]
        owners.append(torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens)))
    allowed = (owners[0][:, None] == owners[1][None]).to(q.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 16**0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def values_and_gradients(out: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("queries", [KEYS, CLS], ids=["all", "cls"])
def test_sdpa_is_block_diagonal(queries: room.Lengths) -> None:
    tensors = inputs(queries)
    got = values_and_gradients(attention(tensors, queries=queries, keys=KEYS, choice="sdpa"), tensors)
    want = values_and_gradients(masked(*tensors, queries), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_queries_keys_and_values_in_one_tensor() -> None:
    tensors = inputs(KEYS)
    qkv = torch.stack(tensors, 2).detach().requires_grad_()
    got = values_and_gradients(attention(qkv, queries=KEYS, keys=KEYS, choice="sdpa"), [qkv])
    want = values_and_gradients(attention(tensors, queries=KEYS, keys=KEYS, choice="sdpa"), tensors)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], torch.stack(want[1:], 2))


@pytest.mark.parametrize("queries", [KEYS, CLS], ids=["all", "cls"])
def test_mask_for_xformers(queries: room.Lengths) -> None:
    """xformers has no CPU path; its mask has: SDPA with it equals SDPA per group."""
    tensors = inputs(queries)
    mask = room._block_diagonal(queries, KEYS, torch.device("cpu"))
    bias = mask.materialize((1, 1, tensors[0].shape[1], tensors[1].shape[1]), dtype=torch.float64)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    got = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(got, attention(tensors, queries=queries, keys=KEYS, choice="sdpa"))
    assert mask is room._block_diagonal(queries, KEYS, torch.device("cpu"))  # kept: building it waits for the device


def test_xformers_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no attention for cpu: use model\.attention=auto or sdpa"):
        attention(inputs(KEYS), queries=KEYS, keys=KEYS, choice="xformers")


def test_xformers_without_a_gpu_is_refused_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for choice in ("xformers", "varlen", "triton"):
        with pytest.raises(ConfigError, match=f"model.attention='{choice}' needs a GPU"):
            room.check_choice(choice)
    room.check_choice("auto")


GPU = (torch.device("cuda"), torch.float32, 16)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on a GPU that is not there: they have shapes and dtypes, and xformers looks at no more to choose."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")  # it would pin memory
    monkeypatch.setattr(bias, "_to_device_tensor", lambda x, dtype, device: torch.tensor(x, dtype=dtype).to(device))
    caches = (room._refusal, room._warn_once, room._block_diagonal, room.starts_of)
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode():
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_gpu")
def test_auto_on_a_gpu_is_one_call_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """varlen in half precision; xformers in fp32, also where its own library does not load, but not in a graph."""
    monkeypatch.setattr(room, "FASTEST", {})
    for dtype, compiling, expected in [
        (torch.bfloat16, False, "varlen"),
        (torch.bfloat16, True, "varlen"),
        (torch.float32, False, "xformers"),
    ]:
        tensors = inputs(KEYS, "cuda", dtype)
        q = tensors[0]
        assert room.implementation("auto", q.device, dtype, 16, compiling) == expected
        for choice in ("auto", expected):
            assert attention(tensors, queries=KEYS, keys=KEYS, choice=choice).shape == q.shape
    with pytest.warns(RuntimeWarning, match="because varlen takes bf16 and fp16"):
        assert room.implementation("auto", *GPU, compiling=True) == "sdpa"
    with pytest.raises(ConfigError, match=r"varlen takes bf16 and fp16.*use model.attention=auto"):
        room.implementation("varlen", *GPU)
    assert room.implementation("auto", torch.device("cuda"), torch.bfloat16, 12, compiling=True) == "sdpa"


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_what_was_measured_to_be_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = (torch.device("cuda"), torch.bfloat16, 16)
    for fastest in ("sdpa", "xformers", "triton"):
        monkeypatch.setattr(room, "FASTEST", {"H100": fastest, "A100": "varlen"})
        assert room.implementation("auto", *bf16) == fastest
    assert room.implementation("auto", *bf16, compiling=True) == "triton"
    monkeypatch.setattr(room, "FASTEST", {"H100": "xformers"})
    assert room.implementation("auto", *bf16, compiling=True) == "varlen"
    assert room.implementation("sdpa", *bf16) == "sdpa"


@pytest.mark.usefixtures("no_gpu")
def test_auto_on_an_h100_that_was_not_measured_is_an_h200s(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = (torch.device("cuda"), torch.bfloat16, 16)
    for fastest, expected in [
        ({"NVIDIA H200": "triton"}, "triton"),
        ({"NVIDIA H200": "triton", "NVIDIA H100 80GB HBM3": "sdpa"}, "sdpa"),
        ({"NVIDIA A100": "triton"}, "varlen"),
    ]:
        monkeypatch.setattr(room, "FASTEST", fastest)
        assert room.implementation("auto", *bf16) == expected
    monkeypatch.setattr(room, "FASTEST", {"NVIDIA H200": "triton"})
    for other, capability in [("NVIDIA A100-SXM4-80GB", (8, 0)), ("AMD Instinct MI250X", (9, 0))]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, other=other: other)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, capability=capability: capability)
        assert room.implementation("auto", *bf16) == "varlen"


@pytest.mark.usefixtures("no_gpu")
def test_triton_takes_short_numbers_in_heads_of_some_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FASTEST", {"H100": "triton"})
    tensors = inputs(KEYS, "cuda", torch.bfloat16)
    assert attention(tensors, queries=KEYS, keys=KEYS).shape == tensors[0].shape
    assert attention(torch.stack(tensors, 2), queries=KEYS, keys=KEYS).shape == tensors[0].shape
    for dtype, width, otherwise in [(torch.float32, 16, "xformers"), (torch.bfloat16, 80, "varlen")]:
        assert room.implementation("auto", torch.device("cuda"), dtype, width) == otherwise
        with pytest.raises(ConfigError, match=r"triton takes bf16 and fp16 in heads of 16, 32.*model.attention=auto"):
            room.implementation("triton", torch.device("cuda"), dtype, width)


@pytest.mark.usefixtures("no_gpu")
def test_auto_leaves_long_sequences_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(Exception):
        pass

    def packed(*_: torch.Tensor, **lengths: room.Lengths) -> torch.Tensor:
        raise Called

    monkeypatch.setattr(room, "FASTEST", {"H100": "triton"})
    monkeypatch.setattr(room, "packed_attention", packed)
    for queries in (KEYS, CLS):
        tensors = inputs(queries, "cuda", torch.bfloat16)
        for longest, choice in ((7, "auto"), (6, "triton")):
            monkeypatch.setattr(room, "LONGEST", longest)
            with pytest.raises(Called):
                attention(tensors, queries=queries, keys=KEYS, choice=choice)
        assert attention(tensors, queries=queries, keys=KEYS).shape == tensors[0].shape


def test_starts() -> None:
    assert room.starts_of(((2, 3), (3, 1)), torch.device("cpu")).tolist() == [0, 3, 6, 7, 8, 9]


@pytest.mark.usefixtures("no_gpu")
def test_xformers_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU too new for the kernel that fp32 would take: auto warns and goes on, xformers says why not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    with pytest.warns(RuntimeWarning, match="too new"):
        assert room.implementation("auto", *GPU) == "sdpa"
    with pytest.raises(ConfigError, match=r"(?s)too new.*use model.attention=auto"):
        room.implementation("xformers", *GPU)


@pytest.mark.usefixtures("no_gpu")
def test_missing_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_import_xformers", lambda: ImportError("No module named 'xformers'"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ConfigError, match="pip install"):
            room.check_choice("xformers")
    with pytest.warns(RuntimeWarning, match="No module named 'xformers'"):
        assert room.implementation("auto", *GPU) == "sdpa"
    assert room.implementation("sdpa", *GPU) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="packed attention needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [KEYS, CLS], ids=["all", "cls"])
def test_packed_attention_is_no_worse_than_sdpa(queries: room.Lengths, dtype: torch.dtype) -> None:
    tensors = inputs(queries, "cuda", dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = values_and_gradients(masked(*exact, queries), exact)
    errors = {}
    packed = ["xformers", "varlen", "triton"] if dtype == torch.bfloat16 else ["xformers"]
    for choice in [*packed, "sdpa"]:
        got = values_and_gradients(attention(tensors, queries=queries, keys=KEYS, choice=choice), tensors)
        errors[choice] = [(a.double() - b).abs().max().item() for a, b in zip(got, want, strict=True)]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for choice in packed:
        assert all(x <= s + tolerance for x, s in zip(errors[choice], errors["sdpa"], strict=True)), errors
