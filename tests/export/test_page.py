"""The commands and the code of docs/export.md run as printed."""

import re
import shutil
from pathlib import Path

from pipeline.export import FORMATS
from pipeline.sae import ARCHITECTURES
from tests.tiny import run_cli

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()


def test_the_page_runs_as_printed(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    commands = re.findall(r"^pipeline (.*)$", PAGE, re.M)
    assert len(commands) == 7
    for command in commands:
        assert run_cli(*command.split()) == 0, command
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    scope: dict = {}
    exec(code, scope)
    assert scope["sae"].k == 32
    assert (tmp_path / "project/results/theirs/metrics.json").is_file()


def test_the_table_is_what_the_formats_hold():
    rows = re.findall(r"^\| ([a-z_, ]+) \|(.*)\|$", PAGE, re.M)
    (_, head), *rows = rows
    formats = [cell.strip() for cell in head.split("|")]
    assert formats == list(FORMATS)
    listed = {name.strip(): cells for names, cells in rows for name in names.split(",")}
    assert listed.keys() - {"end_to_end"} == ARCHITECTURES.keys()
    for architecture in ARCHITECTURES:
        cells = dict(zip(formats, listed[architecture].split("|"), strict=True))
        for to in formats[:-1]:
            name = FORMATS[to].names.get(architecture)
            assert (f"`{name}`" if name else "–") in cells[to], (architecture, to)
