"""Patterns of a recipe, matched in time that is linear in the name's length.

A pattern is a regular expression that Python's `re` and RE2 (google-re2) both know and mean alike: RE2 has no backreferences
and no lookaround, which is why it never tries a name twice.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from compress.limits import PATTERN_BYTES, PATTERN_LENGTH

Matcher = Callable[[str], Any]
"""Whether a name begins with what the pattern describes."""

_DIFFERS = re.compile(r"\{,\d+\}|\[\[:|\\[CQpPX]|&&|\(\?[a-zA-Z]*[LUu]")
"""What the two read otherwise: `{,3}` is a count for Python alone, `[[:alpha:]]` a class for RE2 alone."""


class PatternError(ValueError):
    """Why a pattern cannot be used."""


@lru_cache(1024)
def compiled(pattern: str) -> Matcher:
    """The matcher of a pattern; what it returns is true where a name begins with a match. Raises PatternError."""
    import re2  # 3 ms, for recipes with patterns alone

    if len(pattern) > PATTERN_LENGTH:
        raise PatternError(f"it has {len(pattern):,} characters; at most {PATTERN_LENGTH:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of syntax that may change its meaning
            re.compile(pattern)
    except (re.error, OverflowError, FutureWarning) as error:
        raise PatternError(str(error)) from None
    except RecursionError:
        raise PatternError("it is nested too deeply") from None
    if odd := _DIFFERS.search(pattern):
        raise PatternError(f"{odd[0]!r} does not mean the same to Python and RE2; write it another way")
    options = re2.Options()
    options.log_errors, options.max_mem = False, PATTERN_BYTES
    try:
        return re2.compile(pattern, options).match
    except re2.error as error:
        said = error.args[0] if error.args else error
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise PatternError(f"{said} (patterns match in linear time: no backreferences, no lookaround)") from None
