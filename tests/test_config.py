from pathlib import Path

import pytest

from pipeline.config import known_keys, load_config, parse_yaml
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "demo.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_complete(path):
    config = load_config(path)
    assert config.train.betas[0] == 0
    assert len(config.train.betas) == 2


def test_profiles_list_every_key_in_the_same_order():
    for path in CONFIGS.glob("*.yaml"):
        settings = parse_yaml(path.read_text(), where=str(path))
        keys = [f"{section}.{key}" for section, values in settings.items() for key in values]
        assert keys == list(known_keys())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batch_size", -1, "train.batch_size: Input should be greater than 0, got -1"),
        ("train.batch_size", "4096", "train.batch_size: Input should be a valid integer"),
        ("train.batch_size", 4096.0, "train.batch_size: Input should be a valid integer"),
        ("train.batch_size", True, "train.batch_size: Input should be a valid integer"),
        ("train.ks", [4096], "train.ks: expected at most d_sae = 2048, got 4096"),
        ("train.ks", [], "train.ks: Tuple should have at least 1 item"),
        ("train.betas", [1e5, 100000], "train.betas: expected different values"),
        ("cache.layers", [1, 1], "cache.layers: expected different values"),
        ("train.betas", [-1.0], "train.betas.0: Input should be greater than or equal to 0"),
        ("train.betas", [float("nan")], "train.betas.0: Input should be a finite number"),
        ("train.lr", float("nan"), "train.lr: Input should be a finite number"),
        ("train.lr", 0, "train.lr: Input should be greater than 0"),
        ("train.lr_warmup_fraction", 0.9, "train.lr_warmup_fraction + lr_decay_fraction"),
        ("train.decoder_norm", "Unit", "train.decoder_norm: Input should be 'unit' or 'free'"),
        ("cache.acts_dtype", "fp15", "cache.acts_dtype: Input should be 'float32', 'float16'"),
        ("cache.layers", [-1], "cache.layers.0: Input should be greater than or equal to 0"),
        ("cache.layers", 7, "cache.layers: Input should be a valid tuple, got 7"),
        ("corpus.held_out_fraction", 1.5, "corpus.held_out_fraction: Input should be less than 1"),
        ("model.weight_processing", None, "model.weight_processing: Input should be"),
    ],
)
def test_wrong_values_name_key_and_file(key, value, message):
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, {key: value})
    assert message in str(error.value)
    assert str(DEMO) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean train\.betas\?"):
        load_config(DEMO, {"train.beta": [1.0]})


def test_an_unknown_key_in_the_file_is_answered_with_the_nearest(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(DEMO.read_text().replace("  betas:", "  betta:"))
    with pytest.raises(
        ConfigError, match=r"train\.betta: unknown key\. Did you mean train\.betas\?"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: &x [1, 2]\nb: *x", "alias"),  # what alias bombs are made of
        ("a: 1\na: 2", 'duplicate key "a"'),
        ("a: [1", "while parsing a flow sequence"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_unsafe_yaml_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, where="here")


def test_1e5_is_a_number():
    assert parse_yaml("[0, 1e5, 3.0e-4]", where="here") == [0, 1e5, 3e-4]


def test_a_missing_file_and_a_list_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected sections"):
        load_config(tmp_path / "list.yaml")
