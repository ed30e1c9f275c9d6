"""A folder of measurements is replaced as a whole, and an earlier one is never lost."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.evaluate.results_folder import replace_results, write_tables

METRICS = json.dumps({"saes": {}, "model": {}, "hook": "h"})


def measure(out: Path, value: int) -> None:
    with replace_results(out) as folder:
        (folder / "metrics.json").write_text(METRICS)
        write_tables(folder, {"found": [{"value": value}], "nothing": []})


def fail_for_new(path: Path, target: Path, rename=Path.rename) -> Path:
    if path.suffix == ".part":
        raise OSError(errno.EIO, "Input/output error")
    return rename(path, target)


def interrupt(out: Path) -> None:
    with replace_results(out) as folder:
        (folder / "metrics.json").write_text("half")
        raise KeyboardInterrupt


def test_measurements_take_the_place_of_earlier_ones_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "results" / "demo"
    measure(out, 1)
    (out / "gone.csv").write_text("an earlier table")
    measure(out, 2)
    assert sorted(path.name for path in out.iterdir()) == ["found.csv", "metrics.json"]
    assert (out / "found.csv").read_text().split() == ["value", "2"]
    assert [path.name for path in out.parent.iterdir()] == ["demo"]


def test_a_failure_leaves_the_earlier_ones(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    measure(out, 1)
    with pytest.raises(KeyboardInterrupt):
        interrupt(out)
    assert (out / "metrics.json").read_text() == METRICS
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_earlier_ones_are_back_where_the_new_cannot_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    measure(out, 1)
    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(PipelineError, match=r"got Input/output error\. Run `pipeline e"):
        measure(out, 2)
    assert (out / "found.csv").read_text().split() == ["value", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("emptied", [False, True])  # as where DVC or a user made the folder again
def test_earlier_ones_are_back_after_a_death_between_the_two_renames(
    tmp_path: Path, emptied: bool
) -> None:
    out = tmp_path / "demo"
    measure(out, 1)
    out.rename(tmp_path / ".demo.old")
    if emptied:
        out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupt(out)
    assert (out / "found.csv").read_text().split() == ["value", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_a_killed_run_did_not_remove_is_never_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(folder: Path, **_: bool) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    out, old = tmp_path / "demo", tmp_path / ".demo.old"
    measure(out, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            measure(out, 2)
    assert (out / "found.csv").read_text().split() == ["value", "2"]
    assert [path.name for path in old.iterdir()] == ["found.csv"]
    shutil.rmtree(out)
    with pytest.raises(KeyboardInterrupt):
        interrupt(out)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_still_there_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(PipelineError, match="expected a folder that the new"):
        measure(out, 1)
    assert [(path.name, *path.iterdir()) for path in tmp_path.iterdir()] == [("demo",)]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "there/demo", tmp_path / "link"
    measure(target, 1)
    link.symlink_to(target)
    measure(link, 2)
    assert link.is_symlink()
    assert (target / "found.csv").read_text().split() == ["value", "2"]
    assert [path.name for path in target.parent.iterdir()] == ["demo"]


def test_other_files_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "saes.csv").write_text("mine")
    file = tmp_path / "saes.csv"
    for out in (tmp_path, file):
        with pytest.raises(PipelineError, match="got something else"), replace_results(out):
            pytest.fail("something was to be measured")
    assert file.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused_first() -> None:
    with (
        pytest.raises(PipelineError, match="expected a place where"),
        replace_results(Path("/proc/results")),
    ):
        pytest.fail("something was to be measured")


def test_a_place_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(PipelineError, match=r"result folder at \.: expected a folder's name"),
        replace_results(Path()),
    ):
        pytest.fail("measured")
    assert list(tmp_path.iterdir()) == []
