"""Every error the user can meet.

CompressError                 exit 1   anything we can name; one line that says what and what to do
├── RecipeError               exit 2   the recipe is wrong: all problems at once, with line and nearest name
├── PlanError                 exit 2   the recipe is well-formed but impossible for this model or container
├── UnsupportedModel          exit 2   architecture or option we do not implement
│   └── ConfigError           exit 2   config.json is wrong or contradicts itself: all problems at once, with key
├── CheckpointError           exit 1   missing, truncated or non-finite weights
│   └── NoSuchModel           exit 2   what was named is no model: nothing at all, an adapter, another kind of file
├── CalibrationError          exit 1   empty or damaged text, sequences longer than the model allows
│   └── NoSuchText            exit 2   what was named is no text or suite: nothing at all, or nothing that the hub has
├── NumericalError            exit 1   non-finite activations, gram that no damping repairs
├── NoSuchRun                 exit 2   what was named is no finished run and nothing that one made
├── PublishError              exit 1   the hub refuses, breaks off or has other bytes, or a file names a path of this machine
│   └── NoSuchRepository      exit 2   what was named is no repository's id
├── OutputError               exit 1   output folder holds something else or is in use, disk full
├── ResumeError               exit 1   the work folder belongs to another recipe, or is not what was written
├── MissingExtra              exit 1   an optional package is not installed
└── GateFailed                exit 3   the artifact was written but is not fit to deliver
"""

from __future__ import annotations


class CompressError(Exception):
    """Base of every error raised on purpose; `str(error)` is the line shown to the user."""

    exit_code = 1


class RecipeError(CompressError):
    """One or more problems in a recipe; `problems` holds one line each."""

    exit_code = 2

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PlanError(RecipeError):
    """The recipe cannot be carried out on this model or in this container."""


class UnsupportedModel(CompressError):
    exit_code = 2


class ConfigError(UnsupportedModel):
    """One or more problems in a config.json; `problems` holds one each, beginning with its key."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"config.json: {problem}" for problem in problems))


class CheckpointError(CompressError):
    pass


class NoSuchModel(CheckpointError):
    """What was given for a model is none; the message says what it is instead."""

    exit_code = 2


class CalibrationError(CompressError):
    pass


class NoSuchText(CalibrationError):
    """What was named as a text or a suite is none; the message says what would do."""

    exit_code = 2


class NoSuchRun(CompressError):
    """What was given for a run, or for what one made, is none."""

    exit_code = 2


class NumericalError(CompressError):
    pass


class PublishError(CompressError):
    pass


class NoSuchRepository(PublishError):
    """What was given for a repository of a hub cannot be one's id."""

    exit_code = 2


class OutputError(CompressError):
    pass


class ResumeError(CompressError):
    pass


class MissingExtra(CompressError):
    """An optional package is missing; names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {package}; install it with: pip install 'compress-llm[{extra}]'")


class GateFailed(CompressError):
    exit_code = 3
