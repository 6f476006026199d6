"""Text to ids, proved before the work and of every finished file: the model's tokenizer, transformers and llama.cpp agree."""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from compress.containers import Container
from compress.engines.open import VOCABULARIES, Tokenizes
from compress.errors import CompressError, UnsupportedModel
from compress.plan.plan import Plan
from compress.plan.reference import require_same_ids
from compress.report.scorecard import Check
from compress.scoring.results import Fallback
from compress.scoring.tasks.find import find_task
from compress.text import (
    Tokenizer,
    check_ids,
    eval_windows,
    has_tokenizer,
    load_suite,
    load_tokenizer,
    task_documents,
    task_texts,
)
from compress.text.agreement import problem_of, shipped
from compress.text.probes import Departure, Difference, differences, probes, prove


def plan_tokenizer(plan: Plan) -> Tokenizer:
    """The tokenizer of a plan's model. CheckpointError without one."""
    return load_tokenizer(plan.source, plan.spec.vocab_size)


def reads_no_text(plan: Plan) -> bool:
    """Whether a model without a tokenizer will do: nothing calibrates, nothing is scored."""
    return not plan.reads_text and not has_tokenizer(plan.source)


def prove_tokenizer(plan: Plan) -> list[Fallback]:
    """That every reader of what ships gives the ids that calibration and scores see. Returns what deserves a line.

    CheckpointError for a tokenizer that is missing where text is needed, damaged, or of another model; UnsupportedModel
    where an engine would read plain text otherwise; MissingExtra without sentencepiece where the model needs it.
    """
    if reads_no_text(plan):
        return [_line(Departure("text for the checks", "random ids", "the model folder has no tokenizer; none ships"))]
    tokenizer = plan_tokenizer(plan)
    departures = prove(tokenizer)
    for container in plan.recipe.containers:
        departures += _departures(plan, container, tokenizer)
    return [_line(departure) for departure in dict.fromkeys(departures)]


def require_suite(plan: Plan) -> None:
    """Read the texts and the bundled documents that scores will want. CalibrationError where one cannot be had, or holds a
    token that the model has no row for; RecipeError for a task that nobody knows; CheckpointError where what scores compare
    with has another tokenizer."""
    assert plan.recipe.score is not None
    suite, tokenizer = load_suite(plan.recipe.score.suite), plan_tokenizer(plan)
    if plan.base is not None:
        require_same_ids(plan.base, tokenizer)
    for text in suite.texts.values():
        eval_windows(text.text, tokenizer, windows=text.windows, protocol=text.protocol)
    for name, choice in suite.tasks.items():
        if find_task(name, hub=choice.hub).bundled:
            ids = tokenizer.encode_batch([text for row in task_documents(name) for text in task_texts(row)])
            check_ids(np.array([index for row in ids for index in row], dtype=np.int64), tokenizer, f"task '{name}'")


def tokenizer_checks(plan: Plan, container: Container, files: Sequence[Path], source: object) -> Iterator[Check]:
    """The same of a finished file or folder. source: the engine that runs it."""
    if reads_no_text(plan):
        return
    tokenizer, name = plan_tokenizer(plan), f"{container.name} tokenizer"
    if not container.suffix:
        if not has_tokenizer(files[0].parent):  # a format that ships none
            return
        problem, known = problem_of(tokenizer, files[0].parent), shipped(tokenizer).problem
        detail = problem or f"{len(probes(tokenizer))} texts give the same ids in transformers"
        yield Check(name=name, passed=problem is None or known is not None, detail=detail)
    elif container.write_vocabulary is not None and isinstance(source, Tokenizes) and container.engine is not None:
        engine = container.engine.name
        try:
            limits = engine_limits(tokenizer, source, engine)
        except CompressError as error:
            yield Check(name=name, passed=False, detail=str(error))
        else:
            same = f"{len(probes(tokenizer))} texts compared with {engine}: "
            yield Check(name=name, passed=True, detail=same + ("; ".join(limits) or "the same ids"))


def tokenizer_lines(tokenizer: Tokenizer) -> list[Fallback]:
    """What deserves a line of a tokenizer that scores a model. CheckpointError where it loses text."""
    return [_line(departure) for departure in prove(tokenizer)]


def source_lines(tokenizer: Tokenizer, source: object) -> list[Fallback]:
    """What a file's own tokenizer does otherwise than the one that scores it, beyond what its engine cannot help; ids of
    scores do not come from it."""
    if isinstance(source, Tokenizes):
        try:
            engine_limits(tokenizer, source, "its engine")
        except UnsupportedModel as error:
            return [_line(Departure("text read by the file as by the model", "in another way", str(error)))]
    return []


def _line(departure: Departure) -> Fallback:
    return Fallback(subject="tokenizer", wanted=departure.wanted, used=departure.used, reason=departure.reason)


def _departures(plan: Plan, container: Container, tokenizer: Tokenizer) -> list[Departure]:
    """What the reader of a container does otherwise, tried before there is one."""
    engine = container.engine
    if not container.suffix:
        departure = shipped(tokenizer).departure
        return [] if departure is None else [departure]
    if container.write_vocabulary is None or engine is None or engine.name not in VOCABULARIES:
        return []
    if find_spec(engine.package) is None:
        fix = f"{engine.distribution} is not installed: pip install 'compress-llm[{engine.extra}]'"
        return [Departure(f"ids compared with {engine.name}", "not compared", fix)]
    with tempfile.TemporaryDirectory(prefix="compress-vocabulary-") as folder:
        file = Path(folder) / f"vocabulary{container.suffix}"
        container.write_vocabulary(file, plan.source, plan.spec)
        with VOCABULARIES[engine.name](file) as reader:
            engine_limits(tokenizer, reader, engine.name)  # what the engine cannot help is said of the finished file
    return []


def engine_limits(tokenizer: Tokenizer, engine: Tokenizes, name: str) -> list[str]:
    """What an engine's own tokenizer does otherwise and cannot do better, in words: it does not prepare text (normalization,
    a space in front), puts other tokens around one, or splits combining marks and what stands beside control tokens
    otherwise. UnsupportedModel for any other difference.
    """
    tried, limits = probes(tokenizer), _Limits()
    plain, special = ([probe for probe in tried if probe.tokens == tokens] for tokens in (False, True))

    def read(text: str, ends: bool, special: bool = False) -> list[int]:
        return engine.tokenize(text, special=special, ends=ends).tolist()

    found = differences(tokenizer, read, plain, [False])
    for difference in found:
        text = difference.probe.text
        prepared = tokenizer.as_read(text)
        if tuple(read(prepared, False)) == difference.ours or not prepared:
            limits.add("does not prepare text", difference)
        elif any(unicodedata.category(letter).startswith("M") for letter in text):
            # patterns with \p{M} are more than some of llama.cpp's pre-tokenizers know
            limits.add("splits combining marks otherwise", difference)
        else:
            raise UnsupportedModel(
                f"{name} would read text otherwise than {tokenizer.files.path}: {difference}; export another container"
            )
    alike = [probe for probe in plain if probe not in {difference.probe for difference in found}]
    for difference in differences(tokenizer, read, alike[:1], [True]):
        if _one_each(tokenizer):
            raise UnsupportedModel(
                f"{name} would put other tokens around a text: {difference}; export another container"
            )
        limits.add("cannot put the same tokens around a text", difference)
    for difference in differences(tokenizer, lambda text, ends: read(text, ends, special=True), special, [False]):
        if difference.probe.token is not None:
            raise UnsupportedModel(
                f"{name} would not know a token of {tokenizer.files.path}: {difference}; export another container"
            )
        limits.add("reads text beside control tokens otherwise", difference)
    return limits.lines()


@dataclass
class _Limits:
    """Differences by what makes them."""

    found: dict[str, list[Difference]] = field(default_factory=dict)

    def add(self, what: str, difference: Difference) -> None:
        self.found.setdefault(what, []).append(difference)

    def lines(self) -> list[str]:
        return [
            f"it {what}: {differences[0]}" + (f", and {len(differences) - 1} more" if len(differences) > 1 else "")
            for what, differences in self.found.items()
        ]


def _one_each(tokenizer: Tokenizer) -> bool:
    """Whether nothing is put around a text but its beginning-of-text and end-of-text tokens."""
    before, behind = tokenizer.ends
    return before in ((), (tokenizer.bos_token_id,)) and behind in ((), (tokenizer.eos_token_id,))
