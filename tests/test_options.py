"""One field is flag, YAML key, line of run_config.yaml and row of the table; what cannot be read is named."""

import json
import re
import types
import typing
from dataclasses import fields, replace

import pytest
import yaml

from vaerepa import cli
from vaerepa.alignment import METHODS, settings
from vaerepa.cli import as_plain, write_config
from vaerepa.errors import OptionError
from vaerepa.foreign_flags import ALIASES, FOREIGN
from vaerepa.options import FIELDS, Options, changed_options, parse_options
from vaerepa.privacy import public_values

RESUME_CLASSES = ("fixed", "content", "schedule", "free")
KEPT = {name: spec for name, spec in FIELDS.items() if not spec.metadata["secret"]}


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def parse_yaml(config, text: str, *arguments: str) -> Options:
    return parse_options(["--config", config(text), *arguments])


def other_value(name: str):
    """A value of the option's type that is not its default; the texts are such as YAML could take for something else."""
    spec = FIELDS[name]
    is_union = typing.get_origin(spec.type) in (types.UnionType, typing.Union)
    kind = typing.get_args(spec.type)[0] if is_union else spec.type
    if kind is bool:
        return not spec.default
    text = f"no: #{name} 'Ä' 1e-4"
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if typing.get_origin(inner) in (types.UnionType, typing.Union):
            return (None, other_of(typing.get_args(inner)[0], text))
        return (other_of(inner, text), other_of(inner, "0.75"))
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != spec.default)
    return other_of(kind, text)


def other_of(kind, text: str):
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[-1]
    return {int: 12345, float: 1.5e-7, str: text}[kind]


# ---- values


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_yaml_numbers_become_floats(config, text):
    learning_rate = parse_yaml(config, f"learning_rate: {text}").learning_rate
    assert type(learning_rate) is float
    assert learning_rate == 1e-4


@pytest.mark.parametrize("text", ["4e5", "4.0e+5", "400000", "400_000"])
def test_yaml_numbers_become_ints(config, text):
    steps = parse_yaml(config, f"max_train_steps: {text}").max_train_steps
    assert type(steps) is int
    assert steps == 400_000


def test_whole_numbers_become_floats_where_a_float_is_asked_for(config):
    (weight,) = parse_yaml(config, "alignment_weight: 2").alignment_weight
    assert type(weight) is float
    assert weight == 2.0


def test_the_command_line_takes_scientific_notation():
    options = parse_options(["--max_train_steps", "4e5", "--learning_rate=1e-4", "--logit_mean", "-0.5"])
    assert (options.max_train_steps, options.learning_rate, options.logit_mean) == (400_000, 1e-4, -0.5)


def test_the_command_line_wins_over_yaml_over_the_defaults(config):
    text = "learning_rate: 2e-4\nseed: 3\nrandom_flip: true\nema_decay: [0.9, 0.5]\n"
    options = parse_yaml(config, text, "--seed", "4", "--no_random_flip", "--ema_decay", "0.99")
    assert options == replace(Options(), learning_rate=2e-4, seed=4, random_flip=False, ema_decay=(0.99,))


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", "True", "false", "no", "off", "0", "FALSE"])
@pytest.mark.parametrize("where", ["yaml", "flag", "equals"])
def test_switches_take_the_usual_words(config, text, where):
    expected = text.lower() in ("true", "yes", "on", "1")
    line = {"yaml": [], "flag": ["--use_ema", text], "equals": [f"--use_ema={text}"]}[where]
    yaml_text = f"use_ema: {text}" if where == "yaml" else ""
    assert parse_yaml(config, yaml_text, *line, "--seed", "5") == replace(Options(), use_ema=expected, seed=5)


def test_switches_turn_on_and_off_without_a_word():
    options = parse_options(["--random_flip", "--no_use_ema", "--no_center_crop"])
    assert (options.random_flip, options.use_ema, options.center_crop) == (True, False, False)


@pytest.mark.parametrize("line", [["--train-batch-size", "4"], ["--train-batch-size=4"], ["--train_batch_size=4"]])
def test_names_may_be_spelled_with_dashes(config, line):
    assert parse_yaml(config, "train-batch-size: 4") == replace(Options(), train_batch_size=4)
    assert parse_options(line) == replace(Options(), train_batch_size=4)
    assert parse_options(["--no-use-ema"]) == replace(Options(), use_ema=False)


def test_several_folders_are_a_list(config):
    line = ["--train_data_dir", "a b", "c", "--repeats", "10", "1", "--instance_prompt", "sks cat", "a cat"]
    text = "train_data_dir: [a b, c]\nrepeats: [10, 1]\ninstance_prompt: [sks cat, a cat]"
    given = {"train_data_dir": ("a b", "c"), "repeats": (10, 1), "instance_prompt": ("sks cat", "a cat")}
    assert parse_options(line) == parse_yaml(config, text) == replace(Options(), **given)
    assert parse_yaml(config, "train_data_dir: a b\nnum_repeats: 10") == replace(
        Options(), train_data_dir=("a b",), repeats=(10,)
    )
    assert public_values({"train_data_dir": ["/x/a b", "/x/c"]}, FIELDS) == {"train_data_dir": ["a b", "c"]}


def test_home_and_variables_are_expanded_in_paths_alone(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("RUN", "seven")
    options = parse_yaml(config, "train_data_dir: ~/pictures\nnegative_prompt: ~$RUN", "--output_dir", "$HOME/$RUN")
    assert (options.train_data_dir, options.output_dir) == (("/home/ann/pictures",), "/home/ann/seven")
    assert options.negative_prompt == "~$RUN"


@pytest.mark.parametrize("text", ["$NOWHERE/run", "${NOWHERE}/run"])
def test_a_path_with_a_variable_that_is_not_set_is_refused(config, monkeypatch, tmp_path, text):
    monkeypatch.delenv("NOWHERE", raising=False)
    for given in (["--output_dir", text], ["--config", config(f"output_dir: {text}")], ["--config", text]):
        with pytest.raises(OptionError, match=r"NOWHERE.* is not set"):
            parse_options(given)
    (tmp_path / text).mkdir(parents=True)  # a folder may be called so
    assert parse_options(["--output_dir", str(tmp_path / text)]).output_dir == str(tmp_path / text)


def test_what_is_given_twice_is_not_dropped(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"{'seed' if name == 'one' else 'resolution'}: 32")
    files = [part for name in ("one", "two") for part in ("--config", str(tmp_path / f"{name}.yaml"))]
    options = parse_options([*files, "--validation_prompt", "a cat", "--validation_prompts", "a dog", "a tree"])
    assert options == replace(Options(), seed=32, resolution=(32,), validation_prompts=("a cat", "a dog", "a tree"))


def test_later_files_win_over_earlier_ones_and_a_row_lies_over_its_base(tmp_path):
    files = {
        "one.yaml": "seed: 1\nresolution: 64",
        "two.yaml": "seed: 2",
        "table.yaml": "base: one.yaml\nrows:\n  wide: {hidden_size: 64, published: FID 28.9}\n  plain:",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    one, two, rows = (str(tmp_path / name) for name in files)
    assert parse_options(["--config", one, two]) == replace(Options(), seed=2, resolution=(64,))
    wide = replace(Options(), seed=1, resolution=(64,), hidden_size=64)
    assert parse_options(["--config", rows, "--row", "wide"]) == wide
    assert parse_options(["--config", rows, two, "--row", "plain"]) == replace(Options(), seed=2, resolution=(64,))
    for line in ([], ["--row", "narrow"]):
        with pytest.raises(OptionError, match=r"--row.*choose one of wide, plain"):
            parse_options(["--config", rows, *line])
    with pytest.raises(OptionError, match=r"--row wide: no file of --config has `rows`"):
        parse_options(["--config", one, "--row", "wide"])


@pytest.mark.parametrize("text", ["[0.9999, 0.5]", "0.9999 0.5", "\n- 9999e-4\n- 5e-1"])
def test_tuples_from_yaml(config, text):
    assert parse_yaml(config, f"ema_decay: {text}").ema_decay == (0.9999, 0.5)


def test_a_tuple_of_one_needs_no_brackets(config):
    assert parse_yaml(config, "ema_decay: 0.99").ema_decay == (0.99,)


def test_tuples_on_the_command_line():
    options = parse_options(["--ema_decay", "0.9", "0.5", "0.1", "--alignment_t_range", "0", "5e-1"])
    assert options.ema_decay == (0.9, 0.5, 0.1)
    assert options.alignment_t_range == (0.0, 0.5)


@pytest.mark.parametrize(("text", "value"), [("no", "no"), ("'no'", "no"), ("bf16", "bf16"), ("null", None)])
def test_mixed_precision_from_yaml(config, text, value):
    assert parse_yaml(config, f"mixed_precision: {text}").mixed_precision == value


def test_none_unsets_an_option_on_the_command_line(config):
    options = parse_yaml(config, "validation_split: test\nvalidation_steps: 5", "--validation_split", "none")
    assert (options.validation_split, options.validation_steps) == (None, 5)
    assert parse_options(["--alignment", "none"]).alignment == ("none",)
    assert parse_options(["--alignment_stop_step", "none"]).alignment_stop_step is None
    assert parse_options(["--alignment_stop_step", "none", "5"]).alignment_stop_step == (None, 5)


def test_an_empty_yaml_file_leaves_the_defaults(config):
    assert parse_yaml(config, "# nothing\n") == parse_options([]) == Options()


# ---- what cannot be read


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learning_rte", "learning_rate"), ("max_train_step", "max_train_steps"), ("Resolution", "resolution")],
)
def test_an_unknown_yaml_key_names_the_nearest(config, key, nearest):
    message = f"config.yaml: there is no option `{key}`; did you mean `{nearest}`?"
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_yaml(config, f"seed: 1\n{key}: 1")


@pytest.mark.parametrize("key", ["7", "true", "null"])
def test_a_yaml_key_that_is_no_text_is_unknown(config, key):
    with pytest.raises(OptionError, match=f"there is no option `{yaml.safe_load(key)}`"):
        parse_yaml(config, f"{key}: 1")


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--learning_rte", "learning_rate"),
        ("--learning_rte=1", "learning_rate"),
        ("--ema_decays", "ema_decay"),
        ("--max_train_step", "max_train_steps"),
    ],
)
def test_an_unknown_flag_names_the_nearest(argument, nearest):
    with pytest.raises(OptionError) as error:
        parse_options(["--seed", "1", argument, "1"])
    assert f"there is no argument `{argument.split('=')[0]}`; did you mean `--{nearest}`?" in str(error.value)


def test_values_of_several_methods_are_named(config):
    methods = ["--alignment", "vae", "sra"]
    expected = replace(Options(), alignment=("vae", "sra"), alignment_weight=(None, 0.5), alignment_beta=(0.1, 0.05))
    named = ["--alignment_weight", "sra=0.5", "--alignment_beta", "vae=0.1"]
    assert parse_options([*named, *methods]) == expected
    assert parse_yaml(config, "alignment_weight: {sra: 0.5}\nalignment_beta: {vae: 0.1}", *methods) == expected
    ranges = parse_options([*methods, "--alignment_t_range", "sra=0.4,0.7"]).alignment_t_range
    assert ranges == parse_yaml(config, "alignment_t_range: {sra: [0.4, 0.7]}", *methods).alignment_t_range
    assert ranges == (0.0, 1.0, 0.4, 0.7)
    for line, words in ((["repa=1"], "names of --alignment vae sra"), (["vae=much"], "a number")):
        with pytest.raises(OptionError, match=f"--alignment_weight.*{words}|--alignment_weight: expected"):
            parse_options([*methods, "--alignment_weight", *line])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--frobnicate", "3", "--learning_rte", "1"], ["`--frobnicate`.", "`--learning_rte`; did you mean"]),
        (["--optimizer", "lion"], ["--optimizer", "one of adamw, muon, prodigy"]),
        (["--use_adafactor"], ["--optimizer is adamw"]),
        (["--weighting_scheme", "none", "--concepts-list", "a.json"], ["--timestep_sampling", "captions"]),
        (["--num_processes", "2", "--multi-gpu", "--local-rank=0"], ["num_processes", "multi-gpu", "rank", "launcher"]),
        (["--random_flip", "perhaps"], ["--random_flip: expected true or false", "--no_random_flip"]),
        (["--no_use_ema", "true"], ["`true` after --no_use_ema", "--use_ema turns it on"]),
        (["--validation_split", "my", "split"], ["`split` after --validation_split", "quotes"]),
        (["configs/quickstart.yaml"], ["--config configs/quickstart.yaml"]),
        (["--seed"], ["--seed: expected one argument"]),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(line, words):
    with pytest.raises(OptionError) as error:
        parse_options(line)
    assert all(word in str(error.value) for word in words), error.value


def test_flags_of_diffusers_that_mean_the_same_are_taken(config):
    given = parse_options(["--validation_prompt", "a cat", "--instance_data_dir=pictures"])
    assert given == replace(Options(), validation_prompts=("a cat",), train_data_dir=("pictures",))
    assert parse_yaml(config, "validation_prompt: a cat").validation_prompts == ("a cat",)


def test_no_foreign_flag_is_an_option():
    assert not (ALIASES.keys() | FOREIGN.keys()) & FIELDS.keys()
    assert set(ALIASES.values()) <= FIELDS.keys()
    named = {name for sentence in FOREIGN.values() for name in re.findall(r"--([a-z_0-9]+)", sentence)}
    assert named - {"help", "config"} <= FIELDS.keys()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "true", "a number"),
        ("learning_rate", "[1, 2]", "a number"),
        ("adam_beta1", "null", "a number"),
        ("max_train_steps", "many", "a whole number"),
        ("max_train_steps", "2.5", "a whole number"),
        ("max_train_steps", "'2.5'", "a whole number"),
        ("max_train_steps", ".inf", "a whole number"),
        ("max_train_steps", ".nan", "a whole number"),
        ("seed", "{a: 1}", "a whole number"),
        ("output_dir", "[a, b]", "text"),
        ("mixed_precision", "fp8", "one of no, fp16, bf16"),
        ("objective", "ddim", "one of flow_matching, ddpm"),
        ("alignment", "rope", f"one or more values, each one of none, {', '.join(METHODS)}"),
        ("alignment_loss", "true", "one or more values, each one of smooth_l1, l1, l2, cosine"),
        ("alignment_block", "[2, x]", "one or more values, each a whole number"),
        ("alignment_t_range", "[0, half]", "one or more values of type float"),
        ("ema_decay", "[]", "one or more values of type float"),
        ("ema_decay", "[[0.9]]", "one or more values of type float"),
    ],
)
def test_a_wrong_type_says_option_expectation_and_value(config, name, text, expected):
    with pytest.raises(OptionError) as error:
        parse_yaml(config, f"{name}: {text}")
    assert str(error.value) == f"--{name}: expected {expected}, got {yaml.safe_load(text)!r}."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "fast"], "--learning_rate: expected a number, got 'fast'."),
        (["--seed", "1.5"], "--seed: expected a whole number, got '1.5'."),
        (["--max_train_steps", "inf"], "--max_train_steps: expected a whole number, got 'inf'."),
        (["--ema_decay", "0.9", "x"], "--ema_decay: expected one or more values of type float, got ['0.9', 'x']."),
        (["--mixed_precision", "fp8"], "--mixed_precision: expected one of no, fp16, bf16, got 'fp8'."),
    ],
)
def test_a_wrong_type_on_the_command_line(arguments, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_options(arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [("- seed\n- 1", "option: value"), ("just text", "option: value"), ("seed: [1", "not valid YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(config, text, words):
    with pytest.raises(OptionError, match=words):
        parse_yaml(config, text)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"--config .*nothing\.yaml: there is no such file"):
        parse_options(["--config", str(tmp_path / "nothing.yaml")])


# ---- saved runs


def test_a_secret_is_neither_saved_nor_shown(tmp_path):
    options = Options(hub_token="hf_TopSecret")
    write_config(options, tmp_path / "run_config.yaml")
    assert "TopSecret" not in (tmp_path / "run_config.yaml").read_text() + repr(options) + str(as_plain(options))
    with pytest.raises(OptionError) as error:
        cli.convert(FIELDS["hub_token"], ["hf_TopSecret"])
    assert "TopSecret" not in str(error.value)


def test_all_options_survive_a_saved_config(tmp_path):
    others = {name: other_value(name) for name in KEPT}
    assert all(others[name] != spec.default for name, spec in KEPT.items())
    for options in (Options(), Options(**others)):
        write_config(options, tmp_path / "run_config.yaml")
        assert Options(**cli.read_config(Options, tmp_path / "run_config.yaml")) == options
        assert parse_options(["--config", str(tmp_path / "run_config.yaml")]) == options


@pytest.mark.parametrize(
    "text", ["no", "1e-4", "0123", "~", "null ", "", "#1", "a: b", "*", "@x", "äöü 你好", "12:30:00"]
)
def test_any_text_survives_a_saved_config(tmp_path, text):
    write_config(replace(Options(), negative_prompt=text, train_split=text), tmp_path / "run_config.yaml")
    values = cli.read_config(Options, tmp_path / "run_config.yaml")
    assert (values["negative_prompt"], values["train_split"]) == (text, text)


@pytest.mark.parametrize("resume", RESUME_CLASSES)
def test_changed_options_name_one_class(resume):
    saved = json.loads(json.dumps(as_plain(Options())))
    changed = Options(**{name: other_value(name) for name in FIELDS})
    kept = {name: spec for name, spec in KEPT.items() if not cli.is_idle(spec, changed)}
    names = [name for name, spec in kept.items() if spec.metadata["resume"] == resume]
    lines = changed_options(saved, changed, resume)
    assert [line.split()[0] for line in lines] == [f"--{name}" for name in names]
    assert lines == [f"--{n} was {saved[n]!r} and is {as_plain(changed)[n]!r}" for n in names]


def test_every_option_has_a_class():
    assert {spec.metadata["resume"] for spec in FIELDS.values()} == set(RESUME_CLASSES)


@pytest.mark.parametrize("resume", RESUME_CLASSES)
def test_nothing_has_changed_in_the_same_run(resume):
    options = Options(**{name: other_value(name) for name in FIELDS})
    assert changed_options(json.loads(json.dumps(as_plain(options))), options, resume) == []


def test_an_option_that_the_saved_run_did_not_know_is_no_change():
    saved = as_plain(Options())
    del saved["seed"]
    assert changed_options(saved, replace(Options(), seed=5, resolution=(64,)), "fixed") == [
        "--resolution was [256] and is [64]"
    ]


OLD_RUN = {  # as it was saved when there was one method
    "alignment": "vae",
    "alignment_block": 2,
    "alignment_weight": 1.0,
    "alignment_loss": "smooth_l1",
    "alignment_beta": 0.05,
    "alignment_layers": 5,
    "alignment_width": None,
    "alignment_t_range": [0.0, 1.0],
    "alignment_weight_schedule": "constant",
    "alignment_stop_step": 500,
}


def test_a_run_of_a_single_method_goes_on(config):
    options = settings.fill_in_defaults(parse_yaml(config, yaml.safe_dump(OLD_RUN)))
    assert options == settings.fill_in_defaults(Options(alignment_block=(2,), alignment_stop_step=(500,)))
    for resume in ("fixed", "schedule"):
        assert changed_options(OLD_RUN, options, resume) == []
    changed = changed_options(OLD_RUN, replace(options, alignment=("vae", "sra"), alignment_layers=(2,)), "fixed")
    assert changed == ["--alignment was ['vae'] and is ['vae', 'sra']", "--alignment_layers was [5] and is [2]"]
    none = OLD_RUN | {"alignment": "none", "alignment_block": None}
    assert changed_options(none, Options(alignment=("none",)), "fixed") == []


def test_the_table_has_a_row_for_each_option():
    rows = [line for line in cli.table(Options).splitlines() if line.startswith("| `--")]
    assert [re.match(r"\| `--(\w+)`", row)[1] for row in rows] == list(FIELDS)
    for row, (name, spec) in zip(rows, FIELDS.items(), strict=True):
        _, flag, default, meaning, _ = row.split("|")  # a stray pipe would make another column
        assert (f"`--no_{name}`" in flag) == (spec.type is bool)
        assert spec.metadata["help"] in meaning
        assert default.strip().strip("`") == ("" if spec.default is None else plain_text(spec.default))


def plain_text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def help_of(capsys, *names: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_options(["--help", *names])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_help_has_a_line_for_each_option_and_the_whole_meaning_on_request(capsys):
    lines = help_of(capsys).splitlines()
    assert lines[0].endswith(".")  # what it does comes before how it is typed
    for name, spec in FIELDS.items():
        (line,) = (line for line in lines if line.split()[:1] == [f"--{name}"])
        assert spec.metadata["help"].split(". ")[0].rstrip(".") in line
    assert FIELDS["max_bad_fraction"].metadata["help"] in help_of(capsys, "max_bad_fraction")


# ---- rooms


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_options_of_a_method_stand_in_its_file_and_go_with_it(method):
    for spec in fields(method.options) if method.options else ():
        assert method.options.__module__ == method.__module__
        assert FIELDS[spec.name].metadata["goes_with"] == f"alignment {method.name}"


def test_an_option_of_another_method_is_refused():
    options = parse_options(["--alignment", "sra", "vae", "--alignment_target", "velocity"])
    cli.check(options)
    with pytest.raises(OptionError, match="--alignment_target goes with --alignment vae"):
        cli.check(replace(options, alignment=("sra",)))


IDLE = {  # dropouts of the conditioning that a run has not
    "proportion_empty_prompts": (Options(proportion_empty_prompts=0.3), "--text_conditioning"),
    "label_dropout": (Options(label_dropout=0.3, text_conditioning=True), "--no_text_conditioning"),
    "max_sequence_length": (Options(max_sequence_length=8), "--text_conditioning"),
    "negative_prompt": (Options(negative_prompt="a dog"), "--text_conditioning"),
}


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_effect_is_refused_and_may_be_left_out_at_a_restart(name):
    options, other = IDLE[name]
    with pytest.raises(OptionError, match=f"--{name} goes with {other}"):
        cli.check(options)
    without = replace(options, **{name: FIELDS[name].default})
    cli.check(without)
    assert changed_options(as_plain(options), without, "fixed") == []


# ---- paths


def test_a_name_is_local_if_there_was_such_a_folder_when_it_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/digits").mkdir(parents=True)
    names = ["--dataset_name", "user/digits", "--pretrained_model_name_or_path", "user/model", "--train_split", "user"]
    options = parse_options([*names, "--latents_cache", "user/cache"])
    (tmp_path / "user/digits").rmdir()
    (tmp_path / "user/model").mkdir()
    public = public_values(as_plain(options), FIELDS)
    assert options.dataset_name == "./user/digits"
    assert {name: public[name] for name in ("dataset_name", "latents_cache", "train_split")} == {
        "dataset_name": "digits",
        "latents_cache": "cache",
        "train_split": "user",
    }
    assert public["pretrained_model_name_or_path"] == "user/model"


def test_a_run_that_named_a_local_folder_without_a_mark_goes_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/digits").mkdir(parents=True)
    saved = as_plain(Options()) | {"dataset_name": "digits"}  # as earlier versions kept data/digits
    assert changed_options(saved, parse_options(["--dataset_name", "data/digits"]), "content") == []
