"""compress publish: a finished run in a repository of a hub."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from compress.cli.app import show
from compress.cli.options import JsonOption


def publish(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the hub; made where there is none.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be published; asks nobody and needs no token.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="In a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="A branch, made where there is none.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="What the commit says.")] = None,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the address.")] = False,
) -> None:
    """Publish a finished run on the hub: models, card, scorecard and recipe in one commit; the same command resumes."""
    from compress.publish.hub import Destination, require_repository
    from compress.publish.hub import publish as send
    from compress.publish.package import packaged
    from compress.report.progress import Reporter

    require_repository(repo)
    reporter = Reporter(0 if quiet or as_json else 1)
    with reporter.stage("checksums", told=False):
        package = packaged(run, repo)
    to = Destination(repo, revision, private)
    files = [{"name": u.name, "bytes": u.size, "sha256": u.sha256} for u in package.uploads]
    told = {"repo": to.repo, "revision": to.branch, "private": to.private, "bytes": package.bytes, "files": files}
    message = message or package.message
    if dry_run:
        if as_json:
            typer.echo(json.dumps({**told, "message": message, "front_matter": package.front_matter}))
            return
        from compress.report.publish_table import publish_table

        facts = {"repository": repo + (" (private)" if private else ""), "branch": to.branch, "commit": message}
        show(publish_table(facts, {u.name: u.size for u in package.uploads}, package.front_matter))
        return
    found = send(package.uploads, to, message, reporter)
    if as_json:
        typer.echo(json.dumps({**told, "message": message, **asdict(found)}))
        return
    if found.others:
        what = f"{len(found.others)} more files of {repo} are not this run's and stay"
        reporter.say(f"note: {what}: {', '.join(found.others[:5])}{', ...' if len(found.others) > 5 else ''}")
    if found.sent:
        reporter.say(f"{len(found.sent)} of {len(files)} files sent; the hub has all of them as they are here")
    else:
        reporter.say("already published: the hub has all files as they are here")
    typer.echo(found.url)
