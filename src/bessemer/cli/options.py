"""What several commands share: arguments and options, refusals of options of earlier versions, printing of views.

Imports nothing heavy: every command's file may import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

Model = Annotated[str, typer.Argument(help="A model: a folder, a GGUF file, a run, a pulled one, or what finetune wrote.")]
#: A panel of the help.
_TOOLS = "Tools"
Runs = Annotated[Path, typer.Option(help="Folder of the runs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]

# how tokens are chosen: what is not given is the model's own
Temperature = Annotated[
    float | None,
    typer.Option(help="Temperature; 0 is greedy (default: as the model's generation_config.json says, or 0).", min=0.0),
]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens, 0 keeps all (default: the model's).", min=0)]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability (default: the model's).")]
MinP = Annotated[
    float | None,
    typer.Option(help="Leave out tokens below this share of the likeliest one's probability (default: the model's)."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1, makes tokens that occurred before less likely (default: the model's).")
]

Adapter = Annotated[str | None, typer.Option(help="Folder of a low-rank adapter of the model.")]
Speculate = Annotated[str | None, typer.Option(help="Speculative decoding: ngram, mtp, or a draft model.")]
ACTIVATION_BITS = "Bits of activations that meet quantised weights on a processor: 8, or 16, as exact as floats and slower; 8."
ActivationBits = Annotated[int | None, typer.Option(help=ACTIVATION_BITS)]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and answer together (default: the model's context).")
]
McpServersConfig = Annotated[
    Path | None,
    typer.Option(
        help='File of MCP servers, as other programs write it ({"mcpServers": …}): their tools may be called.',
        rich_help_panel=_TOOLS,
    ),
]
ToolTokens = Annotated[
    int,
    typer.Option(
        help="Most tokens of the descriptions of their tools: above, those that a question needs, by its words.",
        min=1,
        rich_help_panel=_TOOLS,
    ),
]
Approve = Annotated[
    str,
    typer.Option(
        help="Before which calls of tools a person is asked: always, never, or tools=NAME,NAME.", rich_help_panel=_TOOLS
    ),
]
ApproveTools = Annotated[
    bool,
    typer.Option(
        "--approve-tools",
        help="Accept tools that are new, or have changed since they were approved.",
        rich_help_panel=_TOOLS,
    ),
]


def print_view(*drawn: RenderableType, soft_wrap: bool = False) -> None:
    """Print what `views` drew. soft_wrap: long lines are left to the terminal, which other programs read better."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=soft_wrap)
    for view in drawn:
        console.print(view)


def retired_option(old: str, new: str) -> Any:
    """An option of an earlier version, absent from the help. Raises ConfigError with its new name when it is given."""

    def refuse(value: Any) -> None:
        if value is not None:
            from bessemer.core.errors import ConfigError

            raise ConfigError(f"{old}: the option is now {new}")

    return typer.Option(old, hidden=True, callback=refuse)
