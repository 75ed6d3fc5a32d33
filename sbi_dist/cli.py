"""The command line: ``sbi-dist COMMAND EXPERIMENT [options]``.

Parses, calls one method of the pipeline, prints where the results are, and maps the outcome to an
exit code: 0 done, 2 bad input, 3 the model failed its calibration, 1 anything else, 130 and 143
interrupted with the state kept.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import click
import yaml

from sbi_dist.errors import InputError, StageError
from sbi_dist.submission.cli import jobs, submit

__all__ = ["main", "run_command"]


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments that every stage takes."""
    for decorate in (
        click.option("--address", metavar="RAY", help="Ray cluster; default: one started here."),
        click.option(
            "--store",
            metavar="URI",
            help="Directory or s3://bucket/prefix for everything durable (field `store`).",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a field, as in --set simulate.num_simulations=5000; repeatable.",
        ),
        click.argument("experiment"),
    ):
        function = decorate(function)
    return function


def _infer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        click.option(
            "--output",
            metavar="URI",
            help="Folder for the results, instead of the store.",
        ),
        click.option("--num-samples", type=int, metavar="N", help="Draws of each observation."),
        click.option(
            "--observations",
            metavar="FILE",
            help="Observations, a file or s3://bucket/path (.parquet, .csv, .npy); default: the "
            "problem's observed data.",
        ),
    ):
        function = decorate(function)
    return function


def _pipeline(
    experiment: str,
    overrides: tuple[str, ...],
    store: str | None,
    address: str | None,
    **infer: Any,
) -> Any:
    from sbi_dist.experiment import load_experiment
    from sbi_dist.pipeline import Pipeline

    given = list(overrides)
    if store is not None:
        given.append(f"store={yaml.safe_dump(store).splitlines()[0]}")
    for name, value in infer.items():
        if value is not None:
            given.append(f"infer.{name}={yaml.safe_dump(value).splitlines()[0]}")
    loaded, base = load_experiment(experiment, given)
    return Pipeline(loaded, base, address)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sbi_dist", prog_name="sbi-dist")
def cli() -> None:
    """Simulation-based inference from an experiment file to posteriors, on Ray.

    EXPERIMENT is a YAML file, or the name of a shipped experiment: gaussian, lynx_hare, coalescent,
    or one of the SBI benchmark (bernoulli_glm, gaussian_linear, gaussian_linear_uniform,
    gaussian_mixture, lotka_volterra, sir, slcp, slcp_distractors, two_moons). Every stage keeps its
    results in the store, finds what is finished, and may be stopped and run again at any time.
    """


@cli.command()
@click.option("--overlap", is_flag=True, help="Train on what has landed while simulation goes on.")
@_common
def run(overlap: bool, **arguments: Any) -> None:
    """All stages: simulate, train, calibrate, infer, report.

    Ends with exit code 3 where the model fails its calibration.
    """
    ran = _pipeline(**arguments).run(overlap)
    failed = None if ran.judged is None else ran.judged.error
    if ran.page is not None:
        click.echo(f"\n{ran.table}")
    if ran.judged is not None:
        click.echo(f"\n{ran.judged.text}")
    if ran.draws is not None and ran.page is not None:
        click.echo(f"\nreport:          {ran.page.uri}/index.html")
        click.echo(f"posterior draws: {ran.draws.uri}")
    else:
        click.echo(f"\nmodel: {ran.model.uri}")
        if failed is None:
            click.echo(
                "The problem has no observed data; draw from its posteriors with "
                "`sbi-dist infer ... --observations FILE`."
            )
    if failed is not None:
        raise failed


@cli.command()
@click.option("--repair", is_flag=True, help="Check every shard; simulate damaged ones again.")
@_common
def simulate(repair: bool, **arguments: Any) -> None:
    """Draw parameters from the prior, simulate data, store them as Parquet shards."""
    done = _pipeline(**arguments).simulate(repair_damaged=repair)
    click.echo(done.store.uri)


@cli.command()
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Rows to simulate again.",
)
@_common
def verify(rows: int, **arguments: Any) -> None:
    """Check every stored simulation's checksum, and simulate a sample of rows again."""
    click.echo(_pipeline(**arguments).verify(rows))


@cli.command()
@_common
def train(**arguments: Any) -> None:
    """Fit the density estimator to the stored simulations."""
    pipeline = _pipeline(**arguments)
    model_id = pipeline.train()
    click.echo(f"{pipeline.store.uri}/models/{model_id}")


@cli.command()
@_common
def tune(**arguments: Any) -> None:
    """Search over the density estimator's settings, on the stored simulations.

    Prints what each setting came to, and the train section of the best one; trains no model.
    """
    found = _pipeline(**arguments).tune()
    click.echo(f"{found.table}\n\n{found.verdict}\n\n{found.section}")
    if found.overrides:
        click.echo(" ".join(found.overrides))
    click.echo(f"{found.store.uri}/best.yaml")


@cli.command()
@click.option("--force", is_flag=True, help="Put the model in use whatever comes of it.")
@_common
def calibrate(force: bool, **arguments: Any) -> None:
    """Check the trained model against held-out simulations; put it in use if it passes.

    Prints what each test found. Ends with exit code 3 where the model fails.
    """
    judged = _pipeline(**arguments).calibrate(force)
    click.echo(judged.text)
    if judged.error is not None:
        raise judged.error


@cli.command()
@click.option(
    "--sizes",
    default="1000,10000,100000",
    show_default=True,
    metavar="NUMBERS",
    help="Numbers of simulations to train on.",
)
@click.option(
    "--observations",
    type=int,
    default=10,
    show_default=True,
    metavar="N",
    help="Compare on the first N of the ten observations.",
)
@click.option(
    "--num-draws", type=int, default=10_000, show_default=True, metavar="N", help="Draws of each."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a field of the experiments, as in --set train.ensemble=3; repeatable.",
)
@click.option("--store", metavar="URI", help="Directory or s3://bucket/prefix for the results.")
@click.option("--address", metavar="RAY", help="Ray cluster; default: one started here.")
@click.argument("tasks", nargs=-1, metavar="[TASK]...")
def benchmark(**arguments: Any) -> None:
    """Train on the SBI benchmark's problems; compare with its reference draws by C2ST.

    TASK is one of the problems, by default all nine. Results are kept in the store: run it again to
    go on, or with more sizes or observations.
    """
    from sbi_dist.benchmark.command import benchmark as compare

    table, folder = compare(**arguments)
    click.echo(f"{table}\n{folder}")


@cli.command()
@click.option(
    "--arviz", metavar="FILE", help="Write the draws to a netCDF file for ArviZ too (.nc)."
)
@_infer_options
@_common
def infer(
    observations: str | None,
    num_samples: int | None,
    output: str | None,
    arviz: str | None,
    **arguments: Any,
) -> None:
    """Draw from the posterior of the observed data, or of a file of observations."""
    if arviz is not None:
        from sbi_dist.posterior.arviz import check_writable

        check_writable(arviz)
    pipeline = _pipeline(**arguments, observations=observations, num_samples=num_samples)
    target, manifest = pipeline.infer(output)
    if arviz is not None:
        pipeline.write_arviz(target, manifest, arviz)
    click.echo(target.uri)


@cli.command()
@click.option("--model", required=True, metavar="ID", help="The model, or `former`.")
@click.option("--force", is_flag=True, help="Even one that failed its calibration.")
@_common
def promote(model: str, force: bool, **arguments: Any) -> None:
    """Make a trained model the one that is used and served, or go back to the former one."""
    click.echo(_pipeline(**arguments).promote(model, force))


@cli.command()
@click.option("--host", metavar="ADDRESS", help="Where to listen (field `serve.host`).")
@click.option("--port", type=int, metavar="N", help="Port to listen on (field `serve.port`).")
@click.option("--detach", is_flag=True, help="Leave it running on the cluster of --address.")
@_common
def serve(host: str | None, port: int | None, detach: bool, **arguments: Any) -> None:
    """Serve the posteriors over HTTP, until interrupted."""
    from sbi_dist.serving.command import serve as serve_models

    for name, value in (("host", host), ("port", port)):
        if value is not None:
            text = yaml.safe_dump(value).splitlines()[0]
            arguments["overrides"] = (*arguments["overrides"], f"serve.{name}={text}")
    pipeline = _pipeline(**arguments)
    serve_models(pipeline.experiment, pipeline.store, pipeline.address, detach, click.echo)


@cli.command()
@_common
def report(**arguments: Any) -> None:
    """Write the report page from what is in the store."""
    page, table = _pipeline(**arguments).report()
    click.echo(table)
    click.echo(f"\n{page.uri}/index.html")


@cli.command()
@_common
def status(**arguments: Any) -> None:
    """Print the resolved experiment file and what there is in its store."""
    click.echo(yaml.safe_dump(_pipeline(**arguments).status(), sort_keys=False), nl=False)


@cli.command()
@click.option(
    "--observations",
    metavar="FILE",
    help="Observations, a file or s3://bucket/path (.parquet, .csv, .npy).",
)
@click.option("--x", metavar="NUMBERS", help="One observation, as in --x 1.0,2.0.")
@click.option(
    "--model", default="promoted", show_default=True, metavar="ID", help="Model that is asked."
)
@click.option(
    "--num-samples",
    type=int,
    default=1000,
    show_default=True,
    metavar="N",
    help="Draws of each observation.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--output",
    metavar="FILE",
    help="Parquet file for the draws, - for standard output; default: a table of the first "
    "observations.",
)
@click.option("--summary", is_flag=True, help="Store summaries of the draws in place of them.")
@click.option(
    "--token-file",
    metavar="FILE",
    help="File with the service's token; default: the variable SBI_DIST_TOKEN.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long one request may take with all its tries; a large catalog is several.",
)
@click.argument("url")
def query(**arguments: Any) -> None:
    """Ask the service at URL for the posteriors of observations."""
    from sbi_dist.serving.query import query as ask

    found = ask(**arguments)
    if found is not None:
        click.echo(found)


cli.add_command(submit)
cli.add_command(jobs)

# The signal that asked the process to stop; a KeyboardInterrupt passes through Ray, its number
# does not.
_received: list[int] = []


def _interrupt(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``sbi-dist``; ends the process with the contract's exit codes."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    # Both signals end the process in order: actors are ended, finished work is in the store.
    _received.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        cli.main(args=arguments, prog_name="sbi-dist", standalone_mode=False)
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (InputError, StageError) as error:
        click.echo(f"sbi-dist: {' '.join(str(error).split())}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = 128 + (_received[0] if _received else signal.SIGINT)
        click.echo(
            "sbi-dist: stopped; what is finished is kept, run the command again to go on", err=True
        )
        return code
    except Exception as error:
        if _received:
            # What was broken off by the signal may end in an error of its own.
            click.echo("sbi-dist: stopped; run the command again to go on", err=True)
            return 128 + _received[0]
        if os.environ.get("SBI_DIST_TRACEBACK"):
            raise
        click.echo(
            f"sbi-dist: unexpected {type(error).__name__}: {error} (set SBI_DIST_TRACEBACK=1 to "
            "see where)",
            err=True,
        )
        return 1
