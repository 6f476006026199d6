"""One thread (the machine is shared, and results then do not depend on it), no network, quiet libraries, a cache of its own."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

os.environ["COMPRESS_CACHE"] = tempfile.mkdtemp(prefix="compress-cache-")
atexit.register(shutil.rmtree, os.environ["COMPRESS_CACHE"], ignore_errors=True)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: spinning threads of two engines slow each other down

import torch  # noqa: E402
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("compress", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("compress")


def pytest_collection_finish() -> None:
    """What has been imported and collected by now stays; searching it for garbage again and again takes long."""
    gc.collect()
    gc.freeze()
