"""Which SAEs share a chart."""

import pytest

from pipeline.report.figures import N_STYLES
from pipeline.report.groups import group_saes, plan_styles, split_rows


def make_saes(ks=(32,), d_saes=(1024,), betas=(0.0,), seeds=(0,)):
    return {
        f"k{k}-beta{beta}-d{d_sae}-seed{seed}": {"k": k, "d_sae": d_sae}
        for k in ks
        for d_sae in d_saes
        for beta in betas
        for seed in seeds
    }


def spell(words):
    """With the spaces at which no line is broken."""
    return (
        words.replace("=", " = ")
        .replace(" latents", "\N{NO-BREAK SPACE}latents")
        .replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    )


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, [""]),
        ({"ks": (3, 32), "d_saes": (1024, 2048), "betas": (0, 1)}, [""]),  # 8 are few enough
        ({"ks": (3, 32), "betas": range(5)}, ["k=3", "k=32"]),
        # Of equal k there are 10, and there is one k.
        (
            {"ks": (3,), "d_saes": (1024, 15360), "betas": range(5)},
            ["1,024 latents", "15,360 latents"],
        ),
        (
            {"ks": (3, 32), "d_saes": (8, 64), "betas": range(5)},
            ["k=3, 8 latents", "k=3, 64 latents", "k=32, 8 latents", "k=32, 64 latents"],
        ),
        ({"seeds": range(12)}, [""]),  # nothing to part them by
    ],
)
def test_groups_are_as_large_as_can_be_told_apart(grid, words):
    saes = make_saes(**grid)
    groups = group_saes(saes)
    assert [group.words for group in groups] == [spell(text) for text in words]
    assert [name for group in groups for name in group.names] == list(saes)
    styles = plan_styles(saes, ["pca", "random"])
    for group in groups:
        assert (
            len({styles[name] for name in (*group.names, "pca", "random")}) == len(group.names) + 2
        )
        colours = [styles[name].split()[0] for name in group.names]
        assert len(set(colours)) == min(len(colours), N_STYLES)


def test_without_saes_there_are_no_styles_but_the_others():
    assert list(plan_styles({}, ["pca"])) == ["pca"]
    assert group_saes({}) == [("", ())]


def test_rows_about_no_sae_are_in_every_group():
    saes = make_saes(ks=(3, 32), betas=range(5))
    names = [*saes, "random directions"]
    tables = {"saes": [{"sae": name, **sae} for name, sae in saes.items() for _ in range(2)]}
    found = dict(split_rows([{"sae": name} for name in names], tables))
    assert {words: len(rows) for words, rows in found.items()} == {
        spell("k=3"): 6,
        spell("k=32"): 6,
    }
    assert all(rows[-1]["sae"] == "random directions" for rows in found.values())
    assert dict(split_rows([{"sae": "a"}], {})) == {"": [{"sae": "a"}]}
