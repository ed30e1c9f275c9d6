from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.paths import format_number, plan_paths

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (32.0, "32"),
        (0.001, "0.001"),
        (1e5, "1e5"),
        (2.5e6, "2.5e6"),
        (1e-5, "1e-5"),
        (9999.0, "9999"),
        (12345.0, "1.2345e4"),
        (1.5, "1.5"),
    ],
)
def test_numbers_as_people_write_them(value, text):
    assert format_number(value) == text
    assert float(text) == value


@pytest.mark.parametrize(
    ("overrides", "corpus", "store", "run"),
    [
        # the profile's own settings go where DVC tracks them
        ({}, "demo", "demo", "demo"),
        ({"cache.layers": [7], "train.betas": [0, 3e4]}, "demo", "demo", "demo"),
        # a setting shows in the folders that it decides, and in no other
        ({"train.betas": [1e5]}, "demo", "demo", "demo+betas=1e5"),
        ({"cache.layers": [3, 7]}, "demo", "demo+layers=3,7", "demo+layers=3,7"),
        (
            {"model.name": "/tmp/my model"},
            "demo+name=tmp_my_model",
            "demo+name=tmp_my_model",
            "demo+name=tmp_my_model",
        ),
        # where to run decides nothing
        ({"run.workers": 2}, "demo", "demo", "demo"),
    ],
)
def test_default_paths(overrides, corpus, store, run):
    paths = plan_paths("demo", load_config(DEMO, overrides), load_config(DEMO))
    assert (paths.corpus, paths.store, paths.run) == (
        Path("data") / corpus,
        Path("stores") / store,
        Path("runs") / run,
    )
