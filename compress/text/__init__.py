"""Text in: calibration and evaluation sets, their documents, windows of tokens. Neither torch nor transformers at import."""

from compress.text.documents import load_documents, task_documents
from compress.text.sets import Suite, TextSet, data_root, find_data, load_definition, load_suite
from compress.text.tokenizer import load_tokenizer
from compress.text.windows import calibration_windows, eval_windows, prepends_bos

__all__ = [
    "Suite", "TextSet", "calibration_windows", "data_root", "eval_windows", "find_data", "load_definition", "load_documents",
    "load_suite", "load_tokenizer", "prepends_bos", "task_documents",
]  # fmt: skip
