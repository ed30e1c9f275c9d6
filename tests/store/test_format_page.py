"""docs/format.md says what the code does."""

import re
from pathlib import Path

import pytest
import torch

from store import numbers
from store.compression import COMPRESSIONS, list_codecs
from store.layout import permute_rows
from store.manifest import FORMAT, FORMAT_VERSION, FileRecord, Manifest, ShardRecord
from store.metadata import list_metadata
from store.numbers import Statistics
from tests.store.small_store import HOOK, make_spec, write_store
from tests.store.test_numbers import ERROR_BOUNDS

PAGE = (Path(__file__).parents[2] / "docs/format.md").read_text()
TYPES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "object": "dict",
    "list": "tuple",
}


def read_table(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table under a heading."""
    section = PAGE.split(f"\n{heading}\n", 1)[1]
    table = section[section.index("\n|") + 1 :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in table[2:]]


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## manifest.json", Manifest),
        ("### Each shard", ShardRecord),
        ("### Each file", FileRecord),
        ("### Statistics", Statistics),
    ],
)
def test_every_field_is_in_its_table(heading, model):
    table = read_table(heading)
    assert [row[0] for row in table] == list(model.model_fields)
    for name, kind, meaning in table:
        annotation = str(model.model_fields[name].annotation).removeprefix("<class '")
        assert annotation.startswith(TYPES[kind.split(" ")[0]]), name
        assert meaning


@pytest.mark.parametrize("acts_dtype", numbers.VALUE_FORMATS)
@pytest.mark.parametrize("grads_dtype", ["float32", "int8"])
def test_every_array_is_in_the_table(acts_dtype, grads_dtype):
    spec = make_spec(acts_dtype=acts_dtype, grads_dtype=grads_dtype)
    table = {row[0].replace("<hook>", HOOK): row for row in read_table("## Arrays")}
    for path in [path for path, row in table.items() if row[4].startswith("only where")]:
        which = path.rpartition("/")[2].partition("_")[0]
        assert table[path][4] == f"only where {which} are int8"
        if {"acts": acts_dtype, "grads": grads_dtype}[which] != "int8":
            del table[path]
    assert table.keys() == spec.arrays().keys()
    for path, array in spec.arrays().items():
        _, shape, number_format, fill, _ = table[path]
        length = {"slot": "n_slots", "shard": "n_shards"}[array.per]
        assert shape == (f"[{length}, d_model]" if array.row_shape else f"[{length}]")
        stated = {"acts_dtype": acts_dtype, "grads_dtype": grads_dtype}.get(number_format)
        assert (stated or number_format) == array.numbers.name
        assert fill == ("as below" if stated else str(array.numbers.fill).replace("nan", "NaN"))


def test_every_number_format_is_in_the_table():
    table = {row[0]: row[1:] for row in read_table("### Number formats")}
    assert table.keys() == numbers.FORMATS.keys()
    for name, (disk, fill, relative, absolute, largest) in table.items():
        expected = numbers.FORMATS[name]
        assert (disk, fill) == (expected.disk.name, str(expected.fill).replace("nan", "NaN"))
        assert compute(largest) == expected.largest
        if name != "int32":
            assert (compute(relative), compute(absolute)) == ERROR_BOUNDS[name]
    assert "2^-126" in PAGE
    assert float(numbers.SMALLEST_SCALE) == 2.0**-126


def compute(formula: str) -> float:
    return float(eval(formula.replace("^", "**")))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressions(compression):
    text = " ".join(PAGE.split("Compression is one for all arrays")[1].split())
    assert f"`{compression}`" in text
    for codec in list_codecs(compression, 2):
        level = codec["configuration"].get("level", codec["configuration"].get("clevel"))
        assert f"level {level}" in text


def test_constants():
    assert read_table("## manifest.json")[0][2].strip("`") == FORMAT
    assert read_table("## manifest.json")[1][2] == str(FORMAT_VERSION)
    assert f"# The store's format, version {FORMAT_VERSION}\n" in PAGE
    text = " ".join(PAGE.split())
    limits = re.search(r"more than (\S+) of the values saturate, or more than (\S+) of the", text)
    assert limits is not None
    assert float(limits[1]) == numbers.MAX_SATURATED_FRACTION
    assert float(limits[2]) == numbers.MAX_UNDERFLOWED_FRACTION


def test_named_dimensions_and_attributes():
    metadata = list_metadata(make_spec())
    assert metadata[f"{HOOK}/acts/zarr.json"]["dimension_names"] == ["slot", "channel"]
    assert "named `slot`, `channel` and `shard`" in " ".join(PAGE.split())
    for attribute in metadata["zarr.json"]["attributes"]:
        assert f"`{attribute}`" in PAGE.split("Root attributes:")[1].split("\n\n")[0]


def test_printed_permutations():
    examples = re.findall(r"perm = (\[[\d, ]+\])", PAGE)
    assert examples == [str(permute_rows(0, 0, 8).tolist()), str(permute_rows(7, 2, 8).tolist())]


def test_examples_run(tmp_path, monkeypatch):
    """The page's own code, all but xarray's, on a store at the path that it names."""
    spec = make_spec()
    opened = write_store(tmp_path / "stores/demo", spec)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) == 5
    ours, with_zarr, _, with_tensorstore, _ = (
        example.replace("17", "2").replace("1000", "9") for example in examples
    )
    names: dict = {}
    exec(ours, names)
    assert names["token"].acts.equal(opened.read_block(3).acts[2])
    for example in (with_zarr, with_tensorstore):
        exec(example, names)
        assert names["acts"].tolist() == opened.read_slots(0, 0, 9).acts.tolist()


def test_example_of_int8_runs(tmp_path, monkeypatch):
    """Slots of two shards, and exactly what our reader gives."""
    opened = write_store(tmp_path / "stores/demo", make_spec(acts_dtype="int8"))
    monkeypatch.chdir(tmp_path)
    example = re.search(r"acts are int8:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(example[1].replace("1000", "40"), names)
    expected = [opened.read_slots(0, 0, 32).acts, opened.read_slots(1, 0, 8).acts]
    assert names["acts"].tolist() == torch.cat(expected).tolist()
