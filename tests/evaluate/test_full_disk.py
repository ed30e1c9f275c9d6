"""Results on a disk that is full, a real one, privately mounted."""

from store.reader import open_store
from tests.evaluate.small_saes import save_run
from tests.store.test_disk import run_on_mount

# Prints each run's exit code and what stands on the disk after it.
PROGRAM = """
import contextlib, io, os, sys
from pathlib import Path
from tests.tiny import read_tree, run_cli

root, project, run = map(Path, sys.argv[1:])
os.chdir(project)
out, ballast = root / "results/tiny", root / "ballast"
sizes = ("sensitivity_rows", "perturbation_samples", "steering_latents", "splitting_latents")
nothing = [word for size in sizes for word in ("--set", f"evidence.{size}=0")]
less = ["--run", run, "--store", "stores/tiny", "--tokens", "100", *nothing, "--out", out]

def evaluate():
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run_cli("evaluate", *less)
    said = errors.getvalue().replace("\\r", "\\n").splitlines()
    return code, [line for line in said if line and not line.startswith("evaluate: ")]

def fill(room):
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - room)

code, message = evaluate()
assert code == 0, message
(out / "earlier.csv").write_text("a\\n1\\n")
before = read_tree(root / "results")
for room in map(int, ROOMS):
    fill(room)
    code, message = evaluate()
    print(code, read_tree(root / "results") == before, os.listdir(root / "results"), message)
    ballast.unlink()
code, message = evaluate()
print(code, "earlier.csv" in os.listdir(out), os.listdir(root / "results"), message)
"""


def test_a_full_disk_leaves_the_earlier_results(cached, tmp_path):
    run = save_run(tmp_path / "runs/tiny", open_store(cached / "stores/tiny"))
    (tmp_path / "disk").mkdir()
    # Room for no file, for metrics.json alone, for blocks.parquet and some tables too.
    program = PROGRAM.replace("ROOMS", "(0, 8192, 20480)")
    *full, last = run_on_mount(tmp_path / "disk", "size=4m", program, cached, run).splitlines()
    assert len(full) == 3
    for line in full:
        start = f"1 True ['tiny'] ['Error: results in {tmp_path}/disk/results: expected room for"
        assert line.startswith(start), line
        assert "No space left on device" in line
        assert "run `pipeline evaluate` again" in line
    assert last == "0 False ['tiny'] []"
