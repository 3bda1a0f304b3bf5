"""The `bessemer` command. A user's mistake ends in one line and exit code 2; `--debug` shows the traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

import bessemer
from bessemer.cli.agent import agent, journal
from bessemer.cli.bench import bench
from bessemer.cli.chat import chat, demo
from bessemer.cli.compare import compare
from bessemer.cli.convert import export, import_
from bessemer.cli.data import data
from bessemer.cli.doctor import doctor
from bessemer.cli.documents import ask, entailment, index, memory, questions, search
from bessemer.cli.evaluate import evaluate
from bessemer.cli.explain import explain, train_classifier, train_words
from bessemer.cli.finetune import finetune, label
from bessemer.cli.forget import forget
from bessemer.cli.generate import generate
from bessemer.cli.guard import guard
from bessemer.cli.inspect import inspect
from bessemer.cli.launch import launch
from bessemer.cli.library import clean, list_models, pull, rm
from bessemer.cli.mcp import mcp
from bessemer.cli.memorisation import memorisation
from bessemer.cli.merge import average, extend, merge
from bessemer.cli.personalise import person, personalise
from bessemer.cli.plan import plan
from bessemer.cli.quantize import quantize
from bessemer.cli.redteam import redteam
from bessemer.cli.run import init, recipes, run, sweep
from bessemer.cli.scaling import scaling
from bessemer.cli.serve import keys, serve
from bessemer.cli.show import show
from bessemer.cli.tinker import tinker
from bessemer.cli.watermark import watermark

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: bessemer pull smollm2\n\nbessemer chat smollm2",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bessemer {bessemer.__version__}")
        raise typer.Exit


@app.callback()
def _bessemer(
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_print_version),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """A language model from raw text to a deployed assistant."""


def help_(command: Annotated[list[str] | None, typer.Argument(help="A command, as serve or scaling fit.")] = None) -> None:
    """Show the help of a command; `bessemer COMMAND -h` is the same."""
    app([*(command or []), "--help"], standalone_mode=False, prog_name="bessemer")


#: The commands by their panel in `bessemer --help`, in the order of a reader's way through them, each with its examples.
COMMANDS: dict[str, dict[Callable[..., None], tuple[str, ...]]] = {
    "Use a model": {
        demo: ("bessemer demo",),
        pull: ("bessemer pull smollm2", "bessemer pull Qwen/Qwen3-0.6B --name qwen"),
        chat: ("bessemer chat smollm2 --system 'Answer in one sentence.'",),
        generate: ("bessemer generate smollm2 'The furnace' --max-tokens 40",),
        serve: ("bessemer serve smollm2 --port 8000", "bessemer serve big --also small=smollm2 --keys keys.jsonl"),
        list_models: ("bessemer list",),
        rm: ("bessemer rm smollm2",),
    },
    "Make a model": {
        init: ("bessemer init mine",),
        run: ("bessemer run quickstart", "bessemer run recipe.yaml pretrain.steps=200 --name short"),
        recipes: ("bessemer recipes show quickstart",),
        sweep: ("bessemer sweep quickstart pretrain.learning_rate=1e-3,3e-3 --seeds 2",),
        plan: ("bessemer plan 1b --gpus 8 --gpu h100", "bessemer plan --finetune smollm2 tickets.csv"),
    },
    "Tune and convert a model": {
        finetune: ("bessemer finetune smollm2 tickets.csv out",),
        tinker: (
            "bessemer tinker models/smollm2 --port 8000",
            "bessemer tinker models/smollm2 --states saved --keys keys.jsonl",
        ),
        personalise: ("bessemer personalise models/smollm2 ann --people people --minutes 10",),
        person: ("bessemer person ann", "bessemer person ann --export ann.zip", "bessemer person ann --forget"),
        merge: ("bessemer merge out merged",),
        label: ("bessemer label out labels --prompts questions.jsonl",),
        average: ("bessemer average mine@800 mine@1000 averaged",),
        import_: ("bessemer import Qwen/Qwen3-0.6B models/qwen",),
        export: ("bessemer export smollm2 smollm2.gguf --dtype q8_0",),
        quantize: (
            "bessemer quantize smollm2 small --scheme int8",
            "bessemer quantize smollm2 small --scheme int4 --method gptq --calibrate book.txt",
        ),
        extend: ("bessemer extend smollm2 wider --token furnace --special '<|tool|>'",),
    },
    "Measure and look inside": {
        evaluate: ("bessemer evaluate out", "bessemer evaluate smollm2 --tasks arithmetic,code --limit 50"),
        compare: ("bessemer compare mine mine-2", "bessemer compare out"),
        redteam: (
            "bessemer redteam smollm2 --limit 1",
            "bessemer redteam http://127.0.0.1:8000/v1 --attacks direct,role_play --fail-above 20",
        ),
        show: ("bessemer show mine", "bessemer show runs/mine/tokenizer --text book.txt"),
        memorisation: ("bessemer memorisation mine --canaries runs/mine/stages/memorisation/canaries.jsonl",),
        watermark: ("bessemer watermark mark.yaml --new", "bessemer watermark mark.yaml answer.txt --model smollm2"),
        guard: ("bessemer guard 'How do I pick a lock?'", "bessemer guard --policy policy.yaml --surface answer -"),
        inspect: ("bessemer inspect smollm2 'The furnace is hot.' --out page.html",),
    },
    "Answer from documents": {
        index: ("bessemer index handbook handbook.index", "bessemer index python_docs python.index"),
        search: ("bessemer search python.index 'parse a date'",),
        questions: ("bessemer questions python.index cited.jsonl --cited --count 800",),
        ask: ("bessemer ask smollm2 python.index 'How do I parse JSON?'",),
        entailment: ("bessemer entailment python.index models/qwen head.json",),
        memory: ("bessemer memory remembered", "bessemer memory remembered --forget 'my address'"),
    },
    "Act": {
        agent: (
            "bessemer agent smollm2 'Add up the amounts in costs.csv' --files accounts",
            "bessemer agent smollm2 'What time is it in Oslo?' --mcp-servers-config servers.json",
        ),
        journal: ("bessemer journal agents/1", "bessemer journal agents/1 --branch agents/other --at 2"),
        launch: ("bessemer launch claude --url http://127.0.0.1:8000", "bessemer launch codex -- exec 'Fix the test'"),
        mcp: ("bessemer mcp --model smollm2 --index python=python.index", "bessemer mcp --model smollm2 --http --port 8010"),
    },
    "Data": {
        explain: ("bessemer explain page.html --run mine", "bessemer explain 'Click here to buy cheap watches!'"),
        forget: (
            "bessemer forget 00070ad67053bce7a767f8497f9adb05 --copies --dry-run",
            "bessemer forget 00070ad67053bce7a767f8497f9adb05 --check",
        ),
        train_classifier: ("bessemer train-classifier good bad classifiers/quality",),
        train_words: ("bessemer train-words texts words",),
    },
    "Help and upkeep": {help_: ("bessemer help serve",), doctor: ("bessemer doctor",), clean: ("bessemer clean --dry-run",)},
}
#: Commands whose names are keywords or builtins of Python.
_NAMES = {help_: "help", import_: "import", list_models: "list"}


for _panel, _commands in COMMANDS.items():
    for _command, _examples in _commands.items():
        app.command(_NAMES.get(_command), rich_help_panel=_panel, epilog="Example: " + "\n\n".join(_examples))(_command)
app.add_typer(keys, name="keys", rich_help_panel="Use a model")
app.add_typer(scaling, name="scaling", rich_help_panel="Make a model")
app.add_typer(data, name="data", rich_help_panel="Data")
app.add_typer(bench, name="bench", rich_help_panel="Measure and look inside")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 a mistake that the user can mend, 130 interrupted."""
    from bessemer.core.environment import EXTRAS, install_advice, set_environment
    from bessemer.core.errors import BessemerError

    set_environment()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if given[:1] == ["evaluate"] and given[-1] == "--tasks":
        # without a name, --tasks lists the tasks
        given[-1] = "--list-tasks"
    try:
        code = app(given, standalone_mode=False, prog_name="bessemer")
        if sys.stdout is not None:
            # at the end of the process a failed write would go unnoticed
            sys.stdout.flush()
    except BessemerError as error:
        _fail(error, debug)
    except KeyboardInterrupt:
        _stopped()
    except BrokenPipeError:  # `bessemer show … | head`
        _settle_output()
        sys.exit(0)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS or debug:
            raise
        print(f"error: {install_advice(module)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        _usage_error(error, debug)
    if code == 130:
        # typer from 0.29 on turns Ctrl-C into this exit code, without an exception
        _stopped()
    sys.exit(code if isinstance(code, int) else 0)


def _stopped() -> NoReturn:
    from bessemer.core.concurrency import threads_abandoned

    print("\nstopped; the same command goes on from here", file=sys.stderr)
    if threads_abandoned():
        _settle_output()
        sys.stderr.flush()
        os._exit(130)
    sys.exit(130)


def _fail(error: BaseException, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exception(error)
    _settle_output()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _settle_output() -> None:
    """Flush standard output, or drop the rest where it is closed or full: Python would report that when it exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_error(error: Exception, debug: bool) -> NoReturn:
    """Typer's own complaints (a missing argument, an unknown option) and the system's in one line; anything else is our bug."""
    from bessemer.core.errors import as_user_error

    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if isinstance(error, typer.Exit):
        sys.exit(error.exit_code)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    if isinstance(error, typer.Abort):
        # typer before 0.29 turns Ctrl-C into this
        _stopped()
    if message is None or code is None:
        problem = as_user_error(error)
        if problem is None:
            raise error
        _fail(problem.with_traceback(error.__traceback__), debug)
    context = getattr(error, "ctx", None)
    text = _with_nearest(message(), context.command if context else None)
    print(f"error: {text} (see {context.command_path if context else 'bessemer'} --help)", file=sys.stderr)
    sys.exit(code)


def _with_nearest(message: str, command: Any) -> str:
    """The message about an unknown command or option, with the nearest known one; the same for all versions of typer."""
    import difflib
    import re

    unknown = re.match(r"No such (?P<kind>command|option):? '?(?P<name>[^\s']+?)'?(?=[.\s]|$)", message)
    if unknown is None or command is None:
        return message.rstrip(".")
    options = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    known = (
        list(getattr(command, "commands", {})) if unknown["kind"] == "command" else [name for name in options if name[0] == "-"]
    )
    close = difflib.get_close_matches(unknown["name"], known, n=1, cutoff=0.6)
    return f"No such {unknown['kind']} {unknown['name']!r}" + (f"; did you mean {close[0]!r}?" if close else "")
