"""docs/format.md says what the code does."""

import re
from pathlib import Path

import pytest

from store import numbers
from store.layout import permute_rows
from store.manifest import FORMAT, FORMAT_VERSION, FileRecord, Manifest, ShardRecord
from store.metadata import list_metadata
from store.numbers import Statistics
from tests.store.small_store import HOOK, make_spec

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


def test_every_array_is_in_the_table():
    spec = make_spec(acts_dtype="float16", grads_dtype="float32")
    table = {row[0].replace("<hook>", HOOK): row for row in read_table("## Arrays")}
    assert table.keys() == spec.arrays().keys()
    for path, array in spec.arrays().items():
        _, shape, number_format, fill, _ = table[path]
        assert shape == ("[n_slots, d_model]" if array.row_shape else "[n_slots]")
        stated = {"acts_dtype": "float16", "grads_dtype": "float32"}.get(number_format)
        assert (stated or number_format) == array.numbers.name
        assert fill.replace("NaN", "nan") == str(array.numbers.fill)


def test_constants():
    assert read_table("## manifest.json")[0][2].strip("`") == FORMAT
    assert read_table("## manifest.json")[1][2] == str(FORMAT_VERSION)
    assert f"# The store's format, version {FORMAT_VERSION}\n" in PAGE
    text = " ".join(PAGE.split())
    limits = re.search(r"more than (\S+) of the values saturate, or more than (\S+) of the", text)
    assert limits is not None
    assert float(limits[1]) == numbers.MAX_SATURATED_FRACTION
    assert float(limits[2]) == numbers.MAX_UNDERFLOWED_FRACTION
    assert f"fill value {numbers.FORMATS['bfloat16'].fill}" in PAGE


def test_named_dimensions_and_attributes():
    metadata = list_metadata(make_spec())
    assert metadata[f"{HOOK}/acts/zarr.json"]["dimension_names"] == ["slot", "channel"]
    assert "named `slot` and `channel`" in PAGE
    for attribute in metadata["zarr.json"]["attributes"]:
        assert f"`{attribute}`" in PAGE.split("Root attributes:")[1].split("\n\n")[0]


def test_printed_permutations():
    examples = re.findall(r"perm = (\[[\d, ]+\])", PAGE)
    assert examples == [str(permute_rows(0, 0, 8).tolist()), str(permute_rows(7, 2, 8).tolist())]


def test_examples_run(tmp_path, monkeypatch):
    """The page's own code, all but xarray's, on a store at the path that it names."""
    from tests.store.small_store import write_store

    spec = make_spec()
    opened = write_store(tmp_path / "stores/demo", spec)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) == 4
    ours, with_zarr, with_tensorstore, _ = (
        example.replace("17", "2").replace("1000", "9") for example in examples
    )
    names: dict = {}
    exec(ours, names)
    assert names["token"].acts.equal(opened.read_block(3).acts[2])
    for example in (with_zarr, with_tensorstore):
        exec(example, names)
        assert names["acts"].tolist() == opened.read_slots(0, 0, 9).acts.tolist()
