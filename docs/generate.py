"""Write docs/cli.md from `--help` and docs/settings.md from the configuration: `python
docs/generate.py`.

tests/test_docs.py fails when either page is not what this writes.
"""

import inspect
import re
from pathlib import Path

import click

from pipeline import config
from pipeline.cli import cli

DOCS = Path(__file__).parent
CONFIGS = DOCS.parent / "configs"


def render_cli() -> str:
    """The help of every command, as printed at 100 columns."""
    sections = [_help_section(("pipeline",), cli)]
    for name, command in cli.commands.items():
        sections.append(_help_section(("pipeline", name), command))
        if isinstance(command, click.Group):
            sections += [
                _help_section(("pipeline", name, inner), sub)
                for inner, sub in command.commands.items()
            ]
    head = (
        "# The command line\n\nWritten by `python docs/generate.py` from the commands' own help.\n"
    )
    return "\n".join([head, *sections])


def _help_section(path: tuple[str, ...], command: click.Command) -> str:
    context = click.Context(
        command,
        info_name=" ".join(path),
        max_content_width=100,
        terminal_width=100,
        help_option_names=["-h", "--help"],
    )
    return f"## {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```\n"


def render_settings() -> str:
    """A table per section: key, meaning, and the value in each profile."""
    profiles = {path.stem: config.load_config(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    text = (DOCS / "settings_head.md").read_text()
    for section, field in config.Config.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        text += f"\n## {section}\n\n{inspect.getdoc(model)}\n\n"
        text += f"| key | {' | '.join(profiles)} | meaning |\n|---|{'---|' * len(profiles)}---|\n"
        for key, meaning in _meanings(model).items():
            values = (_show(getattr(getattr(c, section), key)) for c in profiles.values())
            text += f"| `{section}.{key}` | {' | '.join(values)} | {meaning} |\n"
    return text


def _meanings(model: type) -> dict[str, str]:
    """What the comment behind each field says."""
    lines = inspect.getsource(model).splitlines()
    fields = [re.match(r"    (\w+): [^#]+(?:# (.*))?$", line) for line in lines]
    return {match[1]: match[2] or "" for match in fields if match}


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    (DOCS / "cli.md").write_text(render_cli())
    (DOCS / "settings.md").write_text(render_settings())


if __name__ == "__main__":
    main()
