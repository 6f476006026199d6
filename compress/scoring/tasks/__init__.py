"""Tasks through lm-eval over any LogitSource: bundled ones offline, a user's own, and all that lm-eval knows by name.

`find.py` knows names, `load.py` makes a suite's tasks ready, `adapter.py` lets lm-eval ask a LogitSource, `run.py` asks,
`outcomes.py` makes rows of a scorecard of the answers. Tokenizing, prompts, truncation and metrics are lm-eval's own
(0.4.13), which is imported where it is used.
"""

from compress.scoring.tasks.load import AskedTask, load_documents, load_tasks
from compress.scoring.tasks.outcomes import Outcomes, task_scores
from compress.scoring.tasks.run import task_outcomes

__all__ = ["AskedTask", "Outcomes", "load_documents", "load_tasks", "task_outcomes", "task_scores"]
