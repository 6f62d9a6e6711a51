"""How `--help` looks: by typer's plain means, in colours and sections. Its rich ones take longer than all the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Commands"]

Function = TypeVar("Function", bound=Callable[..., Any])

_WIDTH = 100  # of the help at most, in a terminal that is wider
_SENTENCE = 1000  # no command's first sentence is longer, so none is cut


class _Command(TyperCommand):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(formatter, _parameters(self, ctx))


class _Group(TyperGroup):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, and the commands in their sections, each with its first sentence."""
        sections = _parameters(self, ctx)
        for name, command in self.commands.items():
            section = getattr(command, "rich_help_panel", None) or "Commands"
            sections.setdefault(section, []).append((name, command.get_short_help_str(_SENTENCE)))
        _write(formatter, sections)


class Commands(typer.Typer):
    """Commands whose help is plain text in sections; `rich_help_panel` names that of a command."""

    def __init__(self, **options: Any) -> None:
        color = False if os.environ.get("NO_COLOR") else None  # None: on a terminal
        settings = {"help_option_names": ["--help", "-h"], "max_content_width": _WIDTH, "color": color}
        super().__init__(
            **options, cls=_Group, context_settings=settings, rich_markup_mode=None, pretty_exceptions_enable=False
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        """Register a command; takes what `typer.Typer.command` takes."""
        return super().command(name, **options, cls=_Command)


def _parameters(command: TyperCommand | TyperGroup, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """Return name and help of a command's arguments and options."""
    sections: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
    for one in command.get_params(ctx):
        if record := one.get_help_record(ctx):
            sections[one.param_type_name].append(record)
    return {"Arguments": sections["argument"], "Options": sections["option"]}


def _write(formatter: Any, sections: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    for title, rows in sections.items():
        if rows:
            with formatter.section(typer.style(title, bold=True)):
                formatter.write_dl([(typer.style(name, fg="cyan"), text) for name, text in rows])
