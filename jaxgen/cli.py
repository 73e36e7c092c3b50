"""The command `jaxgen`: parse, then hand over to the library."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from jaxgen import terminal
from jaxgen.commands.data import Data
from jaxgen.commands.evaluate import Evaluate
from jaxgen.commands.models import Convert, Info
from jaxgen.commands.sample import Sample
from jaxgen.commands.seedselect import Seedselect
from jaxgen.commands.train import Cache, Train
from jaxgen.types import UserError

Command = Sample | Seedselect | Train | Cache | Data | Evaluate | Info | Convert


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 2 and one line for bad input, 130 when stopped by hand."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack the letters of a name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with terminal.interruptible():
            _parse(arguments).run()
    except UserError as error:  # raised where a bad value enters; everything else is our bug
        print(f"jaxgen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who reads us has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a name too long, a folder that vanished
        print(f"jaxgen: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            "jaxgen: out of memory; smaller pictures, or fewer at once, need less", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\njaxgen: stopped; nothing unfinished is left behind", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: Sequence[str] | None) -> Command:
    """The command line as a command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"] and given[1:2] and not given[1].startswith("-"):
        return Train(Path(given[1]), tuple(given[2:]))  # its options depend on the config
    if given[:1] == ["cache"] and given[1:2] and not given[1].startswith("-"):
        return _parse_cache(Path(given[1]), given[2:])
    return terminal.parse(
        Command,
        args=given,
        prog="jaxgen",
        description="Controllable, personalised Stable Diffusion in JAX.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _parse_cache(config: Path, given: list[str]) -> Cache:
    """`--out` is the command's own; the other options are the config's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out", type=Path, default=Cache.out)
    try:
        found, options = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see jaxgen cache --help") from None
    return Cache(config, tuple(options), found.out)
