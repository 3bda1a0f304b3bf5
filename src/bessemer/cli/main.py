"""The `bessemer` command. A user's mistake ends in one line and exit code 2; `--debug` shows the traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from bessemer import __version__
from bessemer.cli.average import average
from bessemer.cli.bench import bench
from bessemer.cli.chat import chat
from bessemer.cli.clean import clean
from bessemer.cli.compare import compare
from bessemer.cli.demo import demo
from bessemer.cli.doctor import doctor
from bessemer.cli.evaluate import evaluate
from bessemer.cli.explain import explain
from bessemer.cli.export import export
from bessemer.cli.extend import extend
from bessemer.cli.finetune import finetune
from bessemer.cli.forget import forget
from bessemer.cli.generate import generate
from bessemer.cli.import_ import import_
from bessemer.cli.init import init
from bessemer.cli.inspect import inspect
from bessemer.cli.keys import keys
from bessemer.cli.label import label
from bessemer.cli.library import list_models, pull, rm
from bessemer.cli.merge import merge
from bessemer.cli.plan import plan
from bessemer.cli.quantize import quantize
from bessemer.cli.recipes import recipes
from bessemer.cli.run import run
from bessemer.cli.scaling import scaling
from bessemer.cli.serve import serve
from bessemer.cli.show import show
from bessemer.cli.sweep import sweep
from bessemer.cli.train_scores import train_classifier, train_words

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bessemer {__version__}")
        raise typer.Exit


@app.callback()
def _bessemer(
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_print_version),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """A language model from raw text to a deployed assistant."""


_COMMANDS = (
    *(run, sweep, plan, recipes, init, doctor, show, explain, forget, inspect, evaluate),
    *(
        finetune,
        label,
        compare,
        clean,
        demo,
        chat,
        generate,
        serve,
        pull,
        rm,
        export,
        quantize,
        merge,
        extend,
        average,
        train_classifier,
        train_words,
    ),
)
for _command in _COMMANDS:
    app.command()(_command)
# a name that Python keeps for itself
app.command("import")(import_)
app.command("list")(list_models)
app.add_typer(scaling, name="scaling")
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 a mistake that the user can mend, 130 interrupted."""
    from bessemer.core.environment import set_environment
    from bessemer.core.errors import BessemerError, as_storage_error
    from bessemer.core.packages import EXTRAS, install_advice

    set_environment()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        code = app(given, standalone_mode=False, prog_name="bessemer")
    except BessemerError as error:
        _fail(error, debug)
    except KeyboardInterrupt:
        _stopped()
    except BrokenPipeError:  # `bessemer show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        full = as_storage_error(error, error.filename or "the disk")
        _fail(full or error, debug or full is None)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS or debug:
            raise
        print(f"error: {install_advice(module)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        _usage_error(error, debug)
    if code == 130:
        # what typer makes of Ctrl-C since 0.29: the exit code of an interrupt, and no exception
        _stopped()
    sys.exit(code if isinstance(code, int) else 0)


def _stopped() -> NoReturn:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    sys.exit(130)


def _fail(error: BaseException, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _usage_error(error: Exception, debug: bool) -> NoReturn:
    """Typer's own complaints (a missing argument, an unknown option) in one line; anything else is our bug."""
    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if isinstance(error, typer.Exit):
        sys.exit(error.exit_code)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    if isinstance(error, typer.Abort):
        # what typer before 0.29 makes of Ctrl-C
        _stopped()
    if message is None or code is None:
        raise error
    print(f"error: {message()} (see bessemer --help)", file=sys.stderr)
    sys.exit(code)
