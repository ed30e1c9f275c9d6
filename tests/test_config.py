import re
from pathlib import Path

import pytest

from pipeline.cli.options import FLAGS, invoke
from pipeline.config import known_keys, load_config, parse_yaml
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "demo.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_complete(path):
    own = path.stem.endswith("-own")  # these have no TopK SAE: their profile without "-own" has it
    assert (load_config(path).train.betas[0] == 0) != own


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-own.yaml")), ids=lambda path: path.stem)
def test_profiles_of_the_own_loss_differ_in_nothing_else(path):
    base = path.with_stem(path.stem.removesuffix("-own"))
    full, own = (flatten(load_config(profile).model_dump()) for profile in (base, path))
    beta = max(full["train.betas"])
    assert dict(own.items() - full.items()) == {
        "cache.loss": "own",
        "train.betas": (beta,),
        "train.gradients": ("cached",),
    }
    for key in ("loss", "betas", "gradients"):
        assert re.search(rf"^  {key}: .+  # .+", path.read_text(), re.MULTILINE), key


def flatten(settings):
    return {
        f"{section}.{key}": value
        for section, values in settings.items()
        for key, value in values.items()
    }


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
        ("train.d_saes", [64, 31], "train.ks: expected at most d_sae = 31, got 32"),
        ("train.d_saes", [], "train.d_saes: Tuple should have at least 1 item"),
        ("train.d_saes", 64, "train.d_saes: Input should be a valid tuple, got 64"),
        ("train.gradients", [], "train.gradients: Tuple should have at least 1 item"),
        ("train.gradients", ["own"], "train.gradients.0: Input should be 'cached' or 'shuffled'"),
        ("train.ks", [], "train.ks: Tuple should have at least 1 item"),
        ("train.betas", [1e5, 100000], "train.betas: expected different values"),
        ("cache.layers", [1, 1], "cache.layers: expected different values"),
        ("train.betas", [-1.0], "train.betas.0: Input should be greater than or equal to 0"),
        ("train.betas", [float("nan")], "train.betas.0: Input should be a finite number"),
        ("train.lr", float("nan"), "train.lr: Input should be a finite number"),
        ("train.lr", 0, "train.lr: Input should be greater than 0"),
        ("train.architectures", [], "train.architectures: Tuple should have at least 1 item"),
        ("train.architectures", ["topk", "topk"], "train.architectures: expected different values"),
        ("train.architectures", ["top-k"], "train.architectures.0: Input should be 'topk', 'batch"),
        ("train.n_experts", 0, "train.n_experts: Input should be greater than 0"),
        ("train.jumprelu_bandwidth", 0, "train.jumprelu_bandwidth: Input should be greater than 0"),
        ("train.aux_weight", -0.1, "train.aux_weight: Input should be greater than or equal to 0"),
        ("train.aux_weight", float("inf"), "train.aux_weight: Input should be a finite number"),
        ("train.aux_k", 0, "train.aux_k: Input should be greater than 0"),
        ("train.k_start", 31, "train.k_start: expected 32 (the largest of ks) to d_sae = 2048"),
        ("train.k_start", 2049, "train.k_start: expected 32 (the largest of ks) to d_sae = 2048"),
        ("train.k_start", 40, "train.k_start: expected a k where k_anneal_fraction is above 0"),
        ("train.k_anneal_fraction", 0.5, "train.k_start: expected a k where k_anneal_fraction is"),
        ("train.betas", [1e300], "train.betas.0: Input should be less than or equal to 1000000000"),
        ("train.seeds", [2**63], "train.seeds.0: Input should be less than or equal to 92233720"),
        ("train.loss_tokens", 10**400, "train.loss_tokens: Input should be less than or equal to"),
        ("train.k_anneal_fraction", 1.1, "train.k_anneal_fraction: Input should be less than or"),
        ("train.b_dec_start", "median", "train.b_dec_start: Input should be 'mean', 'geometric"),
        ("train.input_scaling", True, "train.input_scaling: Input should be 'none' or 'mean_norm'"),
        ("train.precision", "float16", "train.precision: Input should be 'float32', 'bfloat16' or"),
        ("train.epochs", 0, "train.epochs: Input should be greater than 0"),
        ("train.tokens", 0, "train.tokens: Input should be greater than 0"),
        ("train.steps", -5, "train.steps: Input should be greater than 0"),
        ("train.lr_decay", "sine", "train.lr_decay: Input should be 'linear' or 'cosine'"),
        ("train.lr_end_fraction", 2, "train.lr_end_fraction: Input should be less than or equal"),
        ("train.max_grad_norm", 0, "train.max_grad_norm: Input should be greater than 0"),
        ("train.average_decay", 1.0, "train.average_decay: Input should be less than 1"),
        ("train.checkpoint_every", 0, "train.checkpoint_every: Input should be greater than 0"),
        ("train.loggers", ["mlflow"], "train.loggers.0: Input should be 'wandb' or 'tensorboard'"),
        ("train.loggers", ["wandb", "wandb"], "train.loggers: expected different values"),
        ("train.lr_warmup_fraction", 0.9, "train.lr_warmup_fraction + lr_decay_fraction"),
        ("train.decoder_norm", "Unit", "train.decoder_norm: Input should be 'unit' or 'free'"),
        ("cache.acts_dtype", "fp15", "cache.acts_dtype: Input should be 'float32', 'float16'"),
        ("cache.loss", "later", "cache.loss: Input should be 'full' or 'own', got 'later'"),
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


def test_tokens_and_steps_exclude_each_other():
    with pytest.raises(ConfigError, match=r"train\.steps: expected null where tokens is set"):
        load_config(DEMO, {"train.tokens": 4096, "train.steps": 2})


def test_k_starts_within_an_expert_of_a_switch_sae():
    settings = {"train.n_experts": 4, "train.d_saes": [2048, 4096], "train.architectures": ["topk"]}
    settings["train.k_anneal_fraction"] = 0.5
    assert load_config(DEMO, settings | {"train.k_start": 513}).train.k_start == 513
    settings["train.architectures"] = ["topk", "switch"]
    assert load_config(DEMO, settings | {"train.k_start": 512}).train.k_start == 512
    with pytest.raises(ConfigError, match=r"k_start: expected at most .* = 512 .*, got 513"):
        load_config(DEMO, settings | {"train.k_start": 513})


@pytest.mark.parametrize(("d_saes", "ks"), [([2048, 62], [4]), ([64, 128], [4, 17])])
def test_a_switch_sae_of_every_size_has_experts_that_hold_every_k(d_saes, ks):
    settings = {"train.n_experts": 4, "train.d_saes": d_saes, "train.ks": ks}
    load_config(DEMO, settings)
    smallest = min(d_saes)
    with pytest.raises(
        ConfigError, match=f"train.n_experts: expected a divisor of d_sae = {smallest} that leaves"
    ):
        load_config(DEMO, settings | {"train.architectures": ["switch"]})


@pytest.mark.parametrize(
    ("flags", "tokens", "steps"),
    [
        ({"steps": 7}, None, 7),
        ({"train-tokens": 9000}, 9000, None),
        ({"epochs": 2}, None, None),
        ({"lr": 0.1}, 4096, None),  # what the profile says
    ],
)
def test_a_flag_for_the_length_takes_the_place_of_the_profile_s(
    tmp_path, monkeypatch, flags, tokens, steps
):
    (tmp_path / "configs").mkdir()
    text = DEMO.read_text().replace("  tokens: null\n  steps", "  tokens: 4096\n  steps")
    (tmp_path / "configs" / "demo.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    train = invoke("demo", {FLAGS[name]: value for name, value in flags.items()}, ()).config.train
    assert (train.tokens, train.steps) == (tokens, steps)


def test_flags_for_both_lengths_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected null where tokens is set"):
        invoke("demo", {FLAGS["steps"]: 7, FLAGS["train-tokens"]: 9000}, ())


def test_an_unknown_key_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean train\.betas\?"):
        load_config(DEMO, {"train.beta": [1.0]})


def test_the_key_for_one_size_is_answered_with_that_for_several():
    with pytest.raises(ConfigError, match=r"Did you mean train\.d_saes\?"):
        load_config(DEMO, {"train.d_sae": 64})


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
