"""The texts of a plan, read before anything is promised: enough tokens, a tokenizer that knows them. No torch, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from compress.plan.plan import Plan
from compress.text import (
    SuiteText,
    calibration_windows,
    eval_windows,
    find_data,
    has_tokenizer,
    load_definition,
    load_suite,
    load_tokenizer,
    reads_hub,
)
from compress.text.probes import prove


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
    text, remote = recipe.calibration, list(_remote(plan))
    if plan.needs_calibration and text.dataset not in remote:
        calibration_windows(
            text.dataset, tokenizer, samples=text.samples, length=text.length, seed=recipe.seed,
            max_positions=plan.spec.max_positions,
        )  # fmt: skip
    for scored in _scored(plan):
        if scored.text not in remote:
            eval_windows(scored.text, tokenizer, windows=scored.windows, protocol=scored.protocol)
    return lines + [f"{name} is on the hub: it is read when a run starts" for name in remote]


def _scored(plan: Plan) -> Iterable[SuiteText]:
    return () if plan.recipe.score is None else load_suite(plan.recipe.score.suite).texts.values()


def _remote(plan: Plan) -> Iterator[str]:
    """Texts that would have to be downloaded."""
    if plan.needs_calibration and reads_hub(load_definition(find_data("calibration", plan.recipe.calibration.dataset))):
        yield plan.recipe.calibration.dataset
    for name in dict.fromkeys(scored.text for scored in _scored(plan)):
        if reads_hub(load_definition(find_data("eval", name))):
            yield name
