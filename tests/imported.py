"""What the process that tests fork ranks from has imported before them: most of what they import."""

import gc

import timm  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

import fastdino.training.trainer  # noqa: F401

gc.collect()
gc.freeze()  # DeepSpeed collects garbage whenever it starts: what lives here is none
