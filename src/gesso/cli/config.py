"""`gesso config`: every setting, its value and where it came from. Settings themselves are in `gesso.settings`."""

import json
from typing import Annotated

import typer

from gesso.settings import PROJECT_FILE, explain_settings, user_file


def config(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a setting.")] = False,
) -> None:
    """Show every setting and where it came from.

    A flag is stronger than the environment (GESSO_NAME), then gesso.toml in the working folder, then your own file.
    """
    for setting in explain_settings():
        value = setting.value if isinstance(setting.value, bool | None) else str(setting.value)
        if as_json:
            line = {"name": setting.name, "value": value, "source": setting.source, "description": setting.description}
            typer.echo(json.dumps(line, ensure_ascii=False))
        else:
            typer.echo(f"{setting.name:<24}{value!s:<40}{setting.source:<28}{setting.description}")
    if not as_json:
        typer.echo(f"Files: {PROJECT_FILE} here, and {user_file()}", err=True)
