"""What ranks import, once: the process that imports this module is forked for each of them."""

from __future__ import annotations

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import pytest  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import neox_core.train.run  # noqa: F401

torch.set_num_threads(1)

gc.collect()
# DeepSpeed collects garbage a dozen times while it builds an engine: each time through all objects of the modules.
gc.freeze()
