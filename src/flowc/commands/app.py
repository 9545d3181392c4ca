"""The command line as a whole: every command by name, and what becomes of their errors."""

from __future__ import annotations

import sys

import typer

from flowc.ir.errors import FlowcError

from . import calibrate, compile, doctor, index, model, simulate
from . import run as running
from .console import INTERRUPTED, USAGE, Failed, exit_code, interruptible, note, show_error
from .version import show_version

__all__ = ["app", "run"]

app = typer.Typer(
    name="flowc",
    help="Compile and run RAG and multi-agent programs written as plain Python functions.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage. Data goes to stdout, all else to stderr. "
    "Configuration: flowc.toml, FLOWC_... variables, flags; the later wins.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help without rich is twice as quick, and as readable
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile.compile_)
app.command("opt")(compile.opt)
app.command("run")(running.run)
app.command("verify")(running.verify)
app.add_typer(index.app, name="index")
app.add_typer(model.app, name="model")
app.command("estimate")(calibrate.estimate)
app.command("calibrate")(calibrate.calibrate)
app.command("simulate")(simulate.simulate)
app.command("doctor")(doctor.doctor)
app.command("demo")(model.demo)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", "-V", help="Print the version."),
) -> None:
    if version:
        raise typer.Exit(show_version())


def run(args: list[str]) -> int:
    """Runs one command; the exit code. Errors have been shown when it returns."""
    as_json = "--json" in args
    try:
        with interruptible():
            code = app(args, standalone_mode=False)
            return _ended(code if isinstance(code, int) else 0)
    except Failed as error:
        return error.code
    except FlowcError as error:
        with interruptible():
            show_error(error, as_json=as_json)
        return exit_code(error)
    except typer.Exit as error:
        return _ended(int(error.exit_code))
    except typer.Abort:
        return _ended(INTERRUPTED)
    except Exception as error:
        return _other(error, as_json)


def _ended(code: int) -> int:
    """typer turns Ctrl-C into an exit code and says nothing."""
    if code == INTERRUPTED:
        note("interrupted")
    return code


def _other(error: Exception, as_json: bool) -> int:
    """A mistake on the command line, by typer's own classes, or an error of the user's program with its traceback."""
    show = getattr(error, "show", None)
    if callable(show) and hasattr(error, "exit_code"):
        show(file=sys.stderr)
        return USAGE
    show_error(error, as_json=as_json)
    return 1
