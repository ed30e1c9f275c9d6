"""The command line itself: help, selection of a profile, and what a plan says."""

import os
import sys

import click
import pytest

from pipeline.__main__ import main
from pipeline.cli import cli
from pipeline.cli.options import invoke, selected_profile
from tests.tiny import make_project, run_cli


def every_command(group=cli, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(("path", "command"), [*every_command()], ids=str)
def test_every_command_and_option_has_help(path, command):
    assert command.help, path
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or parameter.help, (path, parameter.name)


def test_the_profile_is_the_one_that_params_yaml_selects(tmp_path, monkeypatch):
    assert selected_profile(tmp_path / "params.yaml") == "demo"
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert invoke(None, {}, ()).profile == "tiny"
    assert invoke("gpt2-small", {}, ()).config.model.name == "gpt2"


def test_set_overrides_any_key(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = invoke(None, {}, ("train.betas=[0, 1e5]", "train.lr=3e-4"))
    assert run.config.train.betas == (0, 1e5)
    assert run.config.train.lr == 3e-4
    assert run.paths.run.name == "tiny+betas=0,1e5+lr=0.0003"


def test_a_dry_run_plans_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli("cache", "--layer", "7", "--dry-run") == 0
    out = capsys.readouterr().out
    for word in ("blocks.7.hook_resid_post", "tokens", "shards", "MB free", "min on cpu"):
        assert word in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "kept"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_the_command_has_torch_ask_for_large_pages_unless_told_otherwise(monkeypatch, given, kept):
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", ["pipeline", "--version"])
    main()
    assert environment["THP_MEM_ALLOC_ENABLE"] == kept
