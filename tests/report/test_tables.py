"""Tables as they come from CSV files."""

import pytest

from pipeline.errors import PipelineError
from pipeline.report.exhibits import EXHIBITS, read_tables, show_exhibits
from tests.report.evidence import write_tables


def read(tmp_path, text: str):
    (tmp_path / "some.csv").write_text(text, encoding="utf-8")
    return read_tables(tmp_path)["some"]


def test_values_are_typed(tmp_path):
    text = 'sae,n,x,seen,words\n"a,b",1,0.5,True,"x\ny"\nc,2,3,False,\n'
    assert read(tmp_path, text) == [
        {"sae": "a,b", "n": 1, "x": 0.5, "seen": True, "words": "x\ny"},
        {"sae": "c", "n": 2, "x": 3.0, "seen": False, "words": None},
    ]


def test_what_is_empty_or_not_finite_is_none(tmp_path):
    rows = read(tmp_path, "a,b,c,d\n,nan,inf,NaN\n1,2.5,-inf,null\n")
    assert rows == [
        {"a": None, "b": None, "c": None, "d": "NaN"},  # beside a word it is one
        {"a": 1, "b": 2.5, "c": None, "d": "null"},
    ]


def test_types_are_those_of_the_whole_column(tmp_path):
    n = 200_000  # more than a block that types are otherwise inferred from
    rows = read(tmp_path, "x\n" + "1\n" * n + "0.5\n")
    assert len(rows) == n + 1
    assert isinstance(rows[0]["x"], float)


def test_a_table_without_rows_is_empty(tmp_path):
    assert read(tmp_path, "a,b\n") == []
    assert read_tables(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("content", [b"", b"a,b\n1\n", b"a\n\xff\xfe\n"])
def test_what_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(PipelineError, match=r"bad\.csv.*Run `pipeline evaluate`"):
        read_tables(tmp_path)


def test_tables_survive_their_files(tmp_path):
    tables = {"one": [{"sae": "a", "x": 1.5, "n": 3, "seen": True, "paper": None}]}
    write_tables(tmp_path, tables)
    assert read_tables(tmp_path) == tables


def test_every_exhibit_is_left_out_without_its_tables():
    assert len(EXHIBITS) == 9
    assert show_exhibits({}, {}) == []
    empty = ("sensitivity", "perturbation", "fronts", "dead", "steering", "firing", "splitting")
    assert show_exhibits({name: [] for name in (*empty, "scaling", "controls")}, {}) == []
