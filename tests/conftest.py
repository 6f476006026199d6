"""One thread (the machine is shared, and results then do not depend on it), no network, quiet libraries."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: spinning threads of two engines slow each other down

import torch  # noqa: E402
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("compress", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("compress")
