"""Text in: calibration and evaluation sets, their documents, windows of tokens. Neither torch nor transformers at import."""

from compress.text.documents import hub_sets, is_bundled_task, load_documents, reads_hub, task_documents, task_texts
from compress.text.evaluation import EvalWindows, eval_windows
from compress.text.files import has_tokenizer, read_files
from compress.text.protocol import PROTOCOLS, Protocol
from compress.text.sets import Suite, SuiteText, TaskChoice, TextSet, data_root, find_data, load_definition, load_suite
from compress.text.sources import BASE_TEXT, CHAT_TEXT, TextSource, text_set
from compress.text.tokenizer import Tokenizer, load_tokenizer
from compress.text.windows import CalibrationText, calibration_text, calibration_windows, check_ids, prepends_bos

__all__ = [
    "BASE_TEXT", "CHAT_TEXT", "PROTOCOLS", "CalibrationText", "EvalWindows", "Protocol", "Suite", "SuiteText", "TaskChoice", "TextSet", "TextSource", "Tokenizer",
    "calibration_text", "calibration_windows", "check_ids", "data_root", "eval_windows", "find_data", "has_tokenizer", "hub_sets", "is_bundled_task",
    "load_definition", "load_documents", "load_suite", "load_tokenizer", "prepends_bos", "read_files", "reads_hub", "task_documents",
    "task_texts", "text_set",
]  # fmt: skip
