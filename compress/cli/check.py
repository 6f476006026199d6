"""compress verify: is it what was delivered?"""

from __future__ import annotations

from typing import Annotated

import typer

from compress.errors import CompressError


def verify(
    target: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run, or an artifact in it.")],
) -> None:
    """Recompute the checksums of what a run delivered: per file ok, changed, missing or unexpected."""
    from compress.report.checksums import OK
    from compress.report.checksums import verify as verify_files
    from compress.report.progress import Reporter

    with Reporter().stage("checksums", told=False):
        found = verify_files(target)
    for name, status in found.items():
        typer.echo(f"{status:<10} {name}")
    if problems := sum(status != OK for status in found.values()):
        raise CompressError(
            f"{problems} of {len(found)} files of {target} are not what was delivered; "
            "fetch them again, or run the recipe again with --fresh"
        )
