"""llama-cpp-python's low-level ctypes interface: started once, its log caught, ggml's type numbers."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from compress.errors import MissingExtra
from compress.machine import threads

# enum ggml_type (ggml.h); the names are this project's codec names.
GGML_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12,
    "q5_k": 13, "q6_k": 14, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21,
    "iq2_s": 22, "iq4_xs": 23, "iq1_m": 29, "bf16": 30, "tq1_0": 34, "tq2_0": 35, "mxfp4": 39,
}  # fmt: skip


_GGML_LOG_ERROR = 4
_GGML_LOG_CONT = 5


class _Log:
    """Receives llama.cpp's log in place of stderr and keeps the last error lines for our own messages."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._level = 0

    def __call__(self, level: int, text: bytes, _user_data: Any) -> None:
        self._level = level if level != _GGML_LOG_CONT else self._level
        line = text.decode("utf-8", "replace").strip()
        if self._level == _GGML_LOG_ERROR and line:
            self.errors = [*self.errors[-7:], line]

    def reason(self) -> str:
        """The last error, as one line for a message; empties the memory."""
        lines, self.errors = self.errors, []
        text = " ".join(word for line in lines for word in line.split() if word.strip("=-"))
        return text[-300:] or "llama.cpp gave no reason"


log = _Log()


@functools.cache
def llama_api() -> ModuleType:
    """llama_cpp.llama_cpp with its backend started and its log silenced; MissingExtra without the package."""
    try:
        from llama_cpp import llama_cpp as api
    except ImportError as error:
        raise MissingExtra("llama-cpp-python", "llama", "running GGUF files in llama.cpp") from error
    callback = api.llama_log_callback(log)
    vars(api)["_compress_log_callback"] = callback  # the C side keeps the pointer: it must outlive every call
    api.llama_log_set(callback, None)
    api.llama_backend_init()
    return api


def default_threads() -> int:
    """The cores we may use, or fewer if OMP_NUM_THREADS says so: llama.cpp's threads wait for each other by spinning,
    which on cores shared with others is many times slower than one thread."""
    return threads()
