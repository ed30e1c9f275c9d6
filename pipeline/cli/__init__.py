"""The `pipeline` command: one click command per stage. This package alone reads YAML paths and
prints.
"""

import difflib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from pipeline.cli import export, results, stages
from pipeline.cli.steer import steer
from pipeline.cli.store import store
from pipeline.errors import ConfigError, PipelineError
from store.errors import StoreError

_INTERRUPTED = "Interrupted. Run the same command again."
_OUT_OF_MEMORY = "can't allocate memory", "out of memory"  # of torch on a CPU and on CUDA
_STOPS = (signal.SIGINT, signal.SIGTERM)


class SuggestingGroup(click.Group):
    """A group that answers a misspelled command with the nearest one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = (
                f" Did you mean {close[0]}?"
                if close
                else f" Commands: {', '.join(self.list_commands(ctx))}."
            )
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, expose_value=False, help="Show an error's traceback.")
@click.version_option(package_name="gsae-pipeline")
def cli() -> None:
    """Cache a model's activations and gradients once; train gradient SAEs from them."""


for command in (
    *(stages.corpus, stages.cache, stages.train, results.evaluate, results.report),
    *(steer, export.export, export.import_, store),
):
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Exits with 0 when it did its work, 2 for a wrong command line or configuration, 130 for Ctrl-C,
    143 for SIGTERM, else 1.
    """
    arguments = sys.argv[1:] if args is None else args
    debug, as_json = "--debug" in arguments, "--json" in arguments
    try:
        with _interrupts():
            cli.main(arguments, prog_name="pipeline", standalone_mode=False, obj=debug)
    except click.ClickException as error:
        command = getattr(error, "ctx", None)
        hint = f" See {command.command_path} --help." if command else ""
        _print_error(f"{error.format_message()}{hint}", as_json=as_json)
        sys.exit(2)
    except (PipelineError, StoreError, OSError, MemoryError) as error:
        if debug:
            raise
        _print_error(_one_line(error), as_json=as_json)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except RuntimeError as error:
        if debug or not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        reason = _one_line(error).splitlines()[0]
        _print_error(
            f"memory: expected enough for the settings, got: {reason:.200}. Lower --d-sae, "
            "--batch-size or --set cache.batch_blocks=N.",
            as_json=as_json,
        )
        sys.exit(1)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C, or SIGTERM, as schedulers send it, unwinds the command; a second one ends the process
    at once, whatever it is doing.

    What is on the disk is whole at any moment, and the kernel releases the locks.
    """
    code = 130  # click aborts without a signal too

    def unwind(number: int, _: object) -> None:
        nonlocal code
        code = 128 + number
        for stop in _STOPS:
            signal.signal(stop, exit_at_once)
        raise KeyboardInterrupt

    def exit_at_once(number: int, _: object) -> None:
        click.echo(_INTERRUPTED, err=True)
        os._exit(128 + number)

    before = {stop: signal.signal(stop, unwind) for stop in _STOPS}
    try:
        yield
    except (click.Abort, KeyboardInterrupt):  # click turns the one into the other
        click.echo(_INTERRUPTED, err=True)
        for stop in _STOPS:
            signal.signal(stop, signal.SIG_IGN)  # little is left to do, and Python ends it
        sys.exit(code)
    finally:
        for stop, handler in before.items():
            if signal.getsignal(stop) is unwind:
                signal.signal(stop, handler)


def _print_error(message: str, *, as_json: bool) -> None:
    """A line for a person, and for a program that asked for JSON an object where it reads it."""
    click.echo(f"Error: {message}", err=True)
    if as_json:
        click.echo(json.dumps({"error": message}))


def _one_line(error: BaseException) -> str:
    return str(error) or type(error).__name__
