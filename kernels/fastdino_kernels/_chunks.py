"""The chunks of the references, which stay in a CPU's cache."""

CHUNK_ELEMENTS = 5 * 2**16  # 1.25 MiB in fp32: the temporaries of a chunk together, which stay close to a core
GPU_CHUNK_ELEMENTS = 2**28  # 1 GiB in fp32: there every operation is a launch, and torch.compile unrolls the chunks


def chunks(length: int, width: int, start: int = 0, *, on_gpu: bool = False) -> list[slice]:
    """range(start, start + length) in slices of one size, each with CHUNK_ELEMENTS at most; none if it is empty.

    ``width``: elements of all temporaries for one of the range; a slice holds at least one. ``on_gpu``: with
    GPU_CHUNK_ELEMENTS at most.
    """
    most = max(1, (GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS) // max(1, width))
    step = max(1, -(-length // max(1, -(-length // most))))
    return [slice(i, min(i + step, start + length)) for i in range(start, start + length, step)]
