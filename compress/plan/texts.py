"""The texts of a plan, read before anything is promised: enough tokens, a tokenizer that knows them. No torch, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from compress.plan.plan import Plan
from compress.plan.reference import require_same_ids
from compress.recipe.schema import Recipe
from compress.text import (
    BASE_TEXT,
    CHAT_TEXT,
    SuiteText,
    calibration_text,
    eval_windows,
    find_data,
    has_tokenizer,
    load_definition,
    load_suite,
    load_tokenizer,
    read_files,
    reads_hub,
    text_set,
)
from compress.text.probes import prove


def choose_text(recipe: Recipe, folder: Path) -> tuple[Recipe, str | None]:
    """The recipe with its calibration text named. One that names none gets talks where the tokenizer in the model's folder has a
    chat template, and a line that says so. CheckpointError for a damaged tokenizer."""
    text = recipe.calibration
    if text.dataset is not None or text.mix is not None:
        return recipe, None
    talks = has_tokenizer(folder) and "default" in read_files(folder).chat_templates
    name = CHAT_TEXT if talks else BASE_TEXT
    chosen = recipe.model_copy(update={"calibration": text.model_copy(update={"dataset": name})})
    why = "the recipe names none, and the tokenizer has a chat template (calibration.dataset names another)"
    return chosen, f"calibration text is {name}, with talks in it: {why}" if talks else None


def read_texts(plan: Plan) -> list[str]:
    """Read what calibration and scores will read, as far as it lies on this machine. Returns what
    deserves a line.

    Raises CalibrationError for texts that are missing, empty, too short or unknown to the tokenizer; CheckpointError for
    a tokenizer that is damaged, of another model, or missing beside the weights; UnsupportedModel for one that a container
    cannot hold.
    """
    recipe = plan.recipe
    if not plan.reads_text and not has_tokenizer(plan.source):
        return []
    if not plan.stamp and not has_tokenizer(plan.source):
        return [
            "there is no tokenizer beside this config.json: no text was read, and nobody knows how many tokens it has"
        ]
    for container in recipe.containers:
        container.require(plan.source, plan.spec)
    tokenizer = load_tokenizer(plan.source, plan.original.vocab_size)
    lines = [str(departure) for departure in prove(tokenizer)]
    if plan.base is not None:
        require_same_ids(plan.base, tokenizer)
    text, remote = recipe.calibration, list(_remote(plan))
    if plan.needs_calibration and text.source.label not in remote:
        found = calibration_text(
            text.source, tokenizer, samples=text.samples, length=text.length, seed=recipe.seed,
            max_positions=plan.spec.max_positions,
        )  # fmt: skip
        lines += [f"calibration text: {line}" for line in found.lines]
    for scored in _scored(plan):
        if scored.text not in remote:
            eval_windows(scored.text, tokenizer, windows=scored.windows, protocol=scored.protocol)
    return lines + [f"{name} is on the hub: it is read when a run starts" for name in remote]


def _scored(plan: Plan) -> Iterable[SuiteText]:
    return () if plan.recipe.score is None else load_suite(plan.recipe.score.suite).texts.values()


def _remote(plan: Plan) -> Iterator[str]:
    """Texts that would have to be downloaded."""
    if plan.needs_calibration and reads_hub(text_set(plan.recipe.calibration.source)):
        yield plan.recipe.calibration.source.label
    for name in dict.fromkeys(scored.text for scored in _scored(plan)):
        if reads_hub(load_definition(find_data("eval", name))):
            yield name
