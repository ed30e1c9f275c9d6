"""Exports to a disk that is full, a real one, privately mounted."""

from pipeline.export import FORMATS
from tests.export.examples import write_run
from tests.store.test_disk import run_on_mount

# Prints each export's exit code and what stands on the disk after it.
PROGRAM = """
import contextlib, io, os, sys
from pathlib import Path
from tests.tiny import run_cli

root, run, formats = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
ballast = root / "ballast"

def export(to):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run_cli("export", run, "--to", to, "--sae", "gsae", "--out", root / "out")
    (_, *said) = errors.getvalue().splitlines()  # that the run is not measured
    return code, os.listdir(root), said

for to in formats:
    for room in map(int, ROOMS):
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - room)
        print(*export(to))
        ballast.unlink()
print(*export("saelens"))
"""


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    # Room for no file, for the weights alone.
    program = PROGRAM.replace("ROOMS", "(0, 8192)")
    *full, last = run_on_mount(tmp_path / "disk", "size=1m", program, run, *FORMATS).splitlines()
    assert len(full) == 2 * len(FORMATS)
    for line in full:
        start = f"1 ['ballast'] ['Error: export at {tmp_path}/disk/out: expected room on the disk, "
        assert line.startswith(start), line
        assert "No space left on device" in line
        assert line.endswith("Make room, or choose another --out.']"), line
    assert last == "0 ['out'] []"
