import errno
import json
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.evaluate.results_folder import replace_results, write_tables

METRICS = json.dumps({"saes": {}, "model": {}, "hook": "h"})


def measure(out: Path, value: int) -> None:
    with replace_results(out) as folder:
        (folder / "metrics.json").write_text(METRICS)
        write_tables(folder, {"found": [{"value": value}], "nothing": []})


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
    out, rename = tmp_path / "demo", Path.rename
    measure(out, 1)

    def fail_for_new(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="Input/output error"):
        measure(out, 2)
    assert (out / "found.csv").read_text().split() == ["value", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_earlier_ones_are_back_after_a_death_between_the_two_renames(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    measure(out, 1)
    out.rename(tmp_path / ".demo.old")
    with pytest.raises(KeyboardInterrupt):
        interrupt(out)
    assert (out / "found.csv").read_text().split() == ["value", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


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
