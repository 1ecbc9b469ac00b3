"""What `saev --help`, `saev COMMAND --help` and `saev COMMAND --help-all` print.

tyro draws the boxes of flags. It joins the lines of a description and does not wrap them, so the
text above the boxes is ours.
"""

import contextlib
import io
import re
import shutil
import sys
import textwrap
import typing as tp
from collections.abc import Mapping, Sequence

import pydantic
import rich.box
import rich.panel
import rich.table
import tyro

from saev.console import Console
from saev.shorthand import COMMANDS, Command, Flag

SHORT, ALL = "--help", "--help-all"
_FIRST = ("run", "open")
"""Commands that a new user needs."""
_EXAMPLES = ("saev run ~/pictures", "saev open")


def wants(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help that is printed here.

    After the name of a subcommand (``data:img-folder``), `--help-all` explains the flags of that.
    """
    if not argv:
        return False
    if argv[0] not in COMMANDS:
        return argv[0] in (SHORT, "-h", ALL)
    return SHORT in argv[1:] or "-h" in argv[1:] or list(argv[1:]) == [ALL]


def show(argv: Sequence[str], commands: Mapping[str, tp.Any], about: str) -> tp.NoReturn:
    """Print the help that a command line asks for, and exit with status 0.

    Args:
        argv: a command line for which :func:`wants` is true.
        commands: all commands, and the configs (or functions) whose docstrings explain them.
        about: text about all of them.
    """
    if argv[0] in COMMANDS:
        _show_command(argv[0], with_all=ALL in argv[1:])
    else:
        _show_commands(commands, about)
    sys.exit(0)


def _show_commands(commands: Mapping[str, tp.Any], about: str) -> None:
    names = sorted(commands, key=lambda name: name not in _FIRST)
    table = rich.table.Table.grid(padding=(0, 2))
    for name in names:
        table.add_row(name, _first_sentence(_paragraphs(commands[name])[0]))
    width = max(40, shutil.get_terminal_size().columns)
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
    sys.stdout.write(_head("COMMAND [FLAGS]", _EXAMPLES, about.split("\n\n")))
    console.print(
        rich.panel.Panel(
            table, title="commands", title_align="left", box=rich.box.ROUNDED, border_style="dim"
        )
    )
    sys.stdout.write("saev COMMAND --help explains a command, saev --version prints versions.\n")


def _show_command(name: str, *, with_all: bool) -> None:
    command = COMMANDS[name]
    is_short = bool(command.groups) and not with_all
    paragraphs = _paragraphs(command.config)
    if is_short:
        paragraphs = [*paragraphs[:1], f"{ALL} explains all flags."]
    usage = " ".join(filter(None, [name, command.words, "[FLAGS]"]))
    shown = _short(name, command) if is_short else command.config
    sys.stdout.write(_head(usage, command.examples, paragraphs))
    sys.stdout.write(_boxes(shown))


def _head(usage: str, examples: Sequence[str], paragraphs: Sequence[str]) -> str:
    """The lines above the boxes: how the command is written, examples, and what it does."""
    width = max(40, shutil.get_terminal_size().columns)
    lines = "\n".join(f"  {line}" for line in examples)
    texts = [textwrap.fill(text, width, break_on_hyphens=False) for text in paragraphs]
    return "\n\n".join([f"usage: saev {usage}", *filter(None, [lines]), *texts]) + "\n\n"


def _paragraphs(documented: tp.Any) -> list[str]:
    """The paragraphs of a docstring, each in one line."""
    return [" ".join(text.split()) for text in (documented.__doc__ or "").split("\n\n")]


class _Captured(io.StringIO):
    """Takes what tyro prints, which is made for a terminal and a character set."""

    def __init__(self, goes_to: tp.TextIO):
        super().__init__()
        self._goes_to = goes_to

    def isatty(self) -> bool:
        """Whether there are colours."""
        return self._goes_to.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Whether there are lines around boxes."""
        return self._goes_to.encoding


def _boxes(shown: tp.Any) -> str:
    """tyro's boxes of the flags of a config."""
    captured = _Captured(sys.stdout)
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        tyro.cli(
            shown, prog="saev", description="", args=[SHORT],
            config=(tyro.conf.CascadeSubcommandArgs,),
        )  # fmt: skip
    return captured.getvalue().partition("\n\n")[2]  # without its line of usage


def _short(name: str, command: Command) -> tp.Any:
    """A config with a command's most common flags, for tyro."""
    fields: dict[str, tp.Any] = {}
    for title, flags in command.groups.items():
        shown: dict[str, tp.Any] = {_key(flag.short).lower(): _field(flag) for flag in flags}
        group: tp.Any = pydantic.create_model(title, **shown)
        fields[_key(title)] = (tyro.conf.OmitArgPrefixes[group], group.model_construct())  # type: ignore[misc]
    return pydantic.create_model(name, **fields)


def _key(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _field(flag: Flag) -> tuple[tp.Any, tp.Any]:
    """Type and default of a flag, for tyro."""
    kind: tp.Any = str
    if isinstance(flag.of, str):
        text, default = flag.of, ""
    else:
        found = flag.of.model_fields[_key(flag.long.rpartition(".")[2].split()[-1])]
        kind, text = found.annotation, _first_sentence(found.description or "")
        empty: tp.Any = () if tp.get_origin(kind) is tuple else ""
        default = empty if found.is_required() else found.get_default(call_default_factory=True)
    if flag.word and flag.short == flag.long:
        kind = tyro.conf.Positional[kind]  # type: ignore[misc]
    if flag.default or flag.word:
        is_whole = flag.default.startswith(("required", "or "))
        hint = f"({flag.default})" if is_whole else f"(default: {flag.default})"
        numbers = (name for t, name in _NUMBERS.items() if t in tp.get_args(kind))
        metavar = flag.word or next(numbers, None)  # without "{None}|"
        kind = tp.Annotated[
            kind, tyro.conf.arg(help_behavior_hint=hint if flag.default else "", metavar=metavar)
        ]
    return (kind, pydantic.Field(default=default, description=text))


_NUMBERS = {int: "INT", float: "FLOAT"}


def _first_sentence(text: str) -> str:
    """The first sentence of a description. --help-all prints the others."""
    parts = re.split(r"(?<=[.;])\s", text)
    for n in range(1, len(parts) + 1):
        sentence = " ".join(parts[:n])
        if sentence.count("(") == sentence.count(")"):
            return sentence.rstrip(".;") + "."
    return text
