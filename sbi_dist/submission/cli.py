"""The commands ``submit`` and ``jobs``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

__all__ = ["jobs", "submit"]

STAGES = (
    "run", "simulate", "verify", "train", "tune", "calibrate", "infer", "promote", "report",
    "status",
)  # fmt: skip

_address = click.option(
    "--address",
    metavar="URL",
    help="The cluster's dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS.",
)
_patience = click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the dashboard may be out of reach.",
)


@click.command(context_settings={"ignore_unknown_options": True})
@_address
@click.option("--detach", is_flag=True, help="Print the job's id and leave it running.")
@click.option(
    "--no-upload",
    is_flag=True,
    help="EXPERIMENT is on the cluster: a shipped name, or a path in its image.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Files of the experiment's folder not to upload, as in a .gitignore; repeatable.",
)
@click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="A variable for the job, which the dashboard shows; repeatable.",
)
@click.option(
    "--python",
    default="python",
    show_default=True,
    metavar="PATH",
    help="The cluster's interpreter that sbi_dist is installed in.",
)
@_patience
@click.argument("stage")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="EXPERIMENT [ARGUMENTS]...")
@click.pass_context
def submit(
    context: click.Context,
    stage: str,
    arguments: tuple[str, ...],
    address: str | None,
    detach: bool,
    no_upload: bool,
    patience_s: float,
    **options: Any,
) -> None:
    """Run a stage as a job of a Ray cluster, and follow it.

    STAGE is run, simulate, verify, train, tune, calibrate, infer, promote, report or status, and
    takes its own arguments. The same submission again attaches to the job that runs, or goes on
    from where it ended. Ends with the job's exit code.
    """
    from sbi_dist.submission import command
    from sbi_dist.submission.access import dashboard_url
    from sbi_dist.submission.api import JobApi
    from sbi_dist.submission.request import Options, make_request

    command.require_stage(stage, STAGES)
    root = context.find_root().command
    assert isinstance(root, click.Group)
    reference, given = _parsed(stage, root.commands[stage], arguments)
    api = JobApi(dashboard_url(address))
    request = make_request(stage, reference, given, Options(not no_upload, **options))
    job_id = command.start(api, request, patience_s)
    if detach:
        click.echo(job_id)
    else:
        command.follow(api, job_id, patience_s)


def _parsed(
    stage: str, command: click.Command, arguments: Sequence[str]
) -> tuple[str, list[tuple[str, str | None]]]:
    """The experiment and the options of a stage, checked and in the order of their declaration."""
    parsed = command.make_context(f"sbi-dist submit {stage}", list(arguments))
    given: list[tuple[str, str | None]] = []
    for parameter in command.params:
        value = parsed.params.get(str(parameter.name))
        if not isinstance(parameter, click.Option) or value in (None, False, ()):
            continue
        if value == parameter.get_default(parsed):
            continue
        flag = parameter.opts[0]
        if parameter.is_flag:
            given.append((flag, None))
        else:
            values = value if parameter.multiple else (value,)
            given += [(flag, str(each)) for each in values]
    return str(parsed.params["experiment"]), given


@click.group()
def jobs() -> None:
    """Look at submitted jobs, follow them, stop them.

    JOB is the id that `sbi-dist submit` prints, or without its last number the newest attempt.
    """


def _of_job(function: Callable[..., Any]) -> Callable[..., Any]:
    return _address(click.argument("job")(function))


@jobs.command("list")
@_address
def list_jobs(address: str | None) -> None:
    """Print the cluster's jobs of sbi_dist, the newest first."""
    from sbi_dist.submission import command

    click.echo(command.table([job for job in _api(address).jobs() if "sbi_dist" in job.metadata]))


@jobs.command()
@_of_job
def status(job: str, address: str | None) -> None:
    """Print what the cluster knows of a job."""
    import yaml

    from sbi_dist.submission import command

    found = command.describe(command.find(_api(address), job))
    click.echo(yaml.safe_dump(found, sort_keys=False), nl=False)


@jobs.command()
@_of_job
def logs(job: str, address: str | None) -> None:
    """Print what a job has written so far."""
    from sbi_dist.submission import command

    api = _api(address)
    click.echo(api.logs(command.find(api, job).id), nl=False)


@jobs.command()
@_of_job
@_patience
def attach(job: str, address: str | None, patience_s: float) -> None:
    """Follow a job; ends with its exit code."""
    from sbi_dist.submission import command

    api = _api(address)
    command.follow(api, command.find(api, job).id, patience_s)


@jobs.command()
@_of_job
def stop(job: str, address: str | None) -> None:
    """End a job in order; what is finished is kept."""
    from sbi_dist.submission import command

    api = _api(address)
    found = command.stop(api, command.find(api, job).id)
    click.echo(f"{found.id}: {found.status.lower()}")


def _api(address: str | None) -> Any:
    from sbi_dist.submission.access import dashboard_url
    from sbi_dist.submission.api import JobApi

    api = JobApi(dashboard_url(address))
    api.check()
    return api
