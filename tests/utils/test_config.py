"""One dataclass per script: defaults < preset < file < flags, strictly and with good messages."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from vim_ssl.utils.config import Choice, build, from_dict, opt, parse, read, save, to_dict
from vim_ssl.utils.names import did_you_mean


@dataclass
class Shared:
    """Settings that every trainer has."""

    batch_size: int = opt(64, "images per device", group="data")
    lr: float = opt(1.5e-4, "learning rate per 256 images", group="optimiser")


@dataclass
class Config(Shared):
    """Train something small.

    A second paragraph that the help leaves out.
    """

    data: str | None = opt(None, "data spec", group="data")
    amp: bool = opt(True, "use bf16 in 100% of the matmuls", group="run")
    objective: Literal["mae", "simmim"] = opt("mae", "what is learned", group="model")
    size: tuple[int, int] = opt((28, 28), "height and width", group="model")
    taps: tuple[int, ...] = opt((), "blocks to tap", group="model")
    betas: tuple[float, float] | None = opt(None, "momenta", group="optimiser")
    tracker: str = opt("csv", "where figures go", choices=("csv", "tensorboard"))
    output: Path = opt(Path("runs"), "run directory")
    model_args: dict[str, Any] = opt({}, "further arguments of the encoder", group="model")
    workers: int | None = opt(None, "loader processes; none: as many as cores")


def demo() -> Config:
    """Digits in minutes."""
    return Config(batch_size=256, data="sample:mnist5k", size=(14, 14))


PRESETS = {"demo": demo, "paper": lambda: Config(batch_size=128)}


def run(*argv: str, **kwargs) -> Config:
    return parse(Config, PRESETS, argv, **kwargs)


def message(capsys, *argv: str, **kwargs) -> str:
    """What the command line says before it leaves with code 2."""
    with pytest.raises(SystemExit) as left:
        run(*argv, **kwargs)
    assert left.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1, "an error is one line"
    return text


def test_without_arguments_the_defaults_hold():
    assert run() == Config()


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--batch-size", "8"], "batch_size", 8),
        (["--batch_size", "8"], "batch_size", 8),
        (["--batch_size=8"], "batch_size", 8),
        (["--batch-size", "8", "--batch-size", "9"], "batch_size", 9),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--lr", "1"], "lr", 1.0),
        (["--no-amp"], "amp", False),
        (["--amp"], "amp", True),
        (["--objective", "simmim"], "objective", "simmim"),
        (["--size", "32", "48"], "size", (32, 48)),
        (["--taps", "-1", "3", "5"], "taps", (-1, 3, 5)),
        (["--taps"], "taps", ()),
        (["--betas", "0.9", "0.95"], "betas", (0.9, 0.95)),
        (["--betas", "none"], "betas", None),
        (["--workers", "None"], "workers", None),
        (["--data", "hf:owner/my_set?split=train"], "data", "hf:owner/my_set?split=train"),
        (["--data=a_b=c_d"], "data", "a_b=c_d"),
        (["--tracker", "tensorboard"], "tracker", "tensorboard"),
        (["--output", "a b/c"], "output", Path("a b/c")),
        (
            ["--model-args", "depth=4", "rope=true", "eps=1e-6", "cls_position=first"],
            "model_args",
            {"depth": 4, "rope": True, "eps": 1e-6, "cls_position": "first"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_sets_its_field_only(argv, field, value):
    config = run(*argv)
    assert config == dataclasses.replace(Config(), **{field: value})
    assert type(getattr(config, field)) is type(value)


def test_later_wins_default_preset_file_flag(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1e-3\nsize: [20, 20]\nworkers: 1  # one is enough\n")
    config = run("--workers", "2", "--preset", "demo", "--config", str(file))
    assert config == Config(
        batch_size=256, data="sample:mnist5k", lr=1e-3, size=(20, 20), workers=2
    )


def test_default_preset_by_name_and_by_what_is_given(tmp_path):
    def choose(given: dict) -> str:
        return "paper" if "data" in given else "demo"

    file = tmp_path / "c.yaml"
    file.write_text("data: photos\n")
    assert run(default_preset="demo") == demo()
    assert run("--preset", "paper", default_preset="demo").batch_size == 128
    assert run(default_preset=choose) == demo()
    assert run("--data", "photos", default_preset=choose).batch_size == 128
    assert run("--config", str(file), default_preset=choose).batch_size == 128


@dataclass
class Named(Config):
    """A config that keeps the name of its preset."""

    preset: str = ""
    every: float = opt(1e9, "epochs between evaluations", "run", words={"never": 1e9})


def small() -> Named:
    """A small model."""
    return Named(lr=1.0)


NAMED = {"small": small, "large": lambda: Named(lr=2.0), "little": small}


def small_for(given: dict) -> Choice:
    assert "preset" not in given
    return Choice("small", "Preset small, as it is a test.", {"lr": 3.0, "workers": 1})


@pytest.mark.parametrize(
    ("argv", "preset", "lr", "workers"),
    [
        (["--preset", "large"], "large", 2.0, None),
        (["--preset", "little"], "small", 1.0, None),  # an alias
        ([], "small", 3.0, 1),
        (["--lr", "4"], "small", 4.0, 1),
        (["--config", "FILE"], "large", 2.0, None),
        (["--config", "FILE", "--preset", "small"], "small", 1.0, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_config_keeps_the_name_of_its_preset(tmp_path, capsys, argv, preset, lr, workers):
    (tmp_path / "c.yaml").write_text("preset: large\n")
    argv = [word.replace("FILE", str(tmp_path / "c.yaml")) for word in argv]
    config = parse(Named, NAMED, argv, default_preset=small_for)
    assert (config.preset, config.lr, config.workers) == (preset, lr, workers)
    assert ("as it is a test" in capsys.readouterr().out) == (workers == 1)


def test_only_the_main_process_prints_why_a_preset_was_chosen(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert parse(Named, NAMED, [], default_preset=small_for).preset == "small"
    assert capsys.readouterr().out == ""


def test_a_file_with_every_setting_leaves_nothing_to_choose(tmp_path, capsys):
    save(Named(lr=7.0), tmp_path / "c.json")
    argv = ["--config", str(tmp_path / "c.json")]
    assert parse(Named, NAMED, argv, default_preset=small_for).lr == 7.0
    assert capsys.readouterr().out == ""


def test_plain_values_build_what_flags_do(capsys):
    for given, argv in (
        ({"preset": "little", "batch_size": 8}, ["--preset", "little", "--batch-size", "8"]),
        ({"data": "photos"}, ["--data", "photos"]),
    ):
        built = build(Named, NAMED, given, small_for)
        assert to_dict(built) == to_dict(parse(Named, NAMED, argv, default_preset=small_for))
    with pytest.raises(ValueError, match="unknown preset 'tiny'"):
        build(Named, NAMED, {"preset": "tiny"})
    with pytest.raises(ValueError, match="Did you mean 'batch_size'"):
        build(Named, NAMED, {"batch_sise": 8})


def test_help_names_the_preset_of_its_defaults_and_shows_words_for_numbers(capsys):
    with pytest.raises(SystemExit):
        parse(Named, NAMED, ["--help"], default_preset=small_for)
    text = capsys.readouterr().out
    head, flags = text.split("where to start:")
    assert "small (also little): A small model." in head
    assert "Preset small, as it is a test. The defaults shown are those of the preset 'small'." in (
        " ".join(head.split())
    )
    assert "(default: 3.0)" in flags
    assert "epochs between evaluations (default: never)" in flags
    assert flags.count("--preset") == 1


@pytest.mark.parametrize(("text", "value"), [("never", 1e9), ("Never", 1e9), ("2", 2.0)])
def test_a_word_stands_for_its_value(tmp_path, text, value):
    (tmp_path / "c.yaml").write_text(f"every: {text}\n")
    assert parse(Named, argv=["--every", text]).every == value
    assert parse(Named, argv=["--config", str(tmp_path / "c.yaml")]).every == value


def test_a_default_may_follow_what_is_given_and_a_stored_value_does_not():
    class Following(Config):
        @classmethod
        def derive_defaults(cls, defaults: dict, given: dict) -> dict:
            return {"lr": defaults["batch_size"] / 1000} | {"workers": len(given)}

    stored = {"lr": 0.5, "workers": 8}
    assert parse(Following, PRESETS, ["--preset", "demo"]).lr == 0.256
    assert parse(Following, PRESETS, ["--lr", "1"]).lr == 1
    assert parse(Following, PRESETS, ["--lr", "1", "--no-amp"]).workers == 2
    taken_up = parse(Following, PRESETS, ["--no-amp"], default_preset=lambda given: stored)
    assert (taken_up.lr, taken_up.workers) == (0.5, 8)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--batchsize", "8"], ["--batchsize", "Did you mean --batch-size?"]),
        (["--bacth_size=8"], ["Did you mean --batch-size?"]),
        (["--batch", "8"], ["unknown flag --batch. Did you mean --batch-size?"]),
        (["--no-apm"], ["Did you mean --no-amp?"]),
        (["--presets", "demo"], ["Did you mean --preset?"]),
        (["photos"], ["'photos'", "--flag"]),
        (["--batch-size", "8.5"], ["--batch-size", "int", "'8.5'"]),
        (["--batch-size"], ["--batch-size"]),
        (["--lr", "fast"], ["--lr", "float", "'fast'"]),
        (["--objective", "simim"], ["--objective", "Did you mean 'simmim'?"]),
        (["--tracker", "wandb"], ["--tracker", "csv, tensorboard"]),
        (["--size", "32"], ["--size", "2"]),
        (["--betas", "0.9"], ["--betas", "2 values"]),
        (["--betas", "0.9", "0.95", "0.99"], ["--betas", "2 values"]),
        (["--model-args", "depth"], ["--model-args", "key=value"]),
        (["--preset", "dmeo"], ["unknown preset 'dmeo'", "Did you mean 'demo'?"]),
        (["--config", "not/there.yaml"], ["not/there.yaml"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_flag_is_named_in_one_line(capsys, argv, parts):
    text = message(capsys, *argv)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("batch_sise: 8", ["'batch_sise'", "Did you mean 'batch_size'?"]),
        ("batch_size: eight", ["batch_size", "int", "'eight'"]),
        ("batch_size: true", ["batch_size", "int", "True"]),
        ("batch_size: 8.0", ["batch_size", "int", "8.0"]),
        ("batch_size:", ["batch_size", "int", "None"]),
        ("amp: 1", ["amp", "true or false"]),
        ("data: 2024", ["data", "quotes"]),
        ("size: 28", ["size", "2 values"]),
        ("size: [28, wide]", ["size", "int", "'wide'"]),
        ("objective: clip", ["objective", "mae, simmim"]),
        ("model_args: [depth]", ["model_args", "mapping"]),
        ("- lr", ["list", "key: value"]),
        ("lr: [1", ["cannot be read as a YAML"]),
    ],
    ids=lambda value: value.replace(":", "") if isinstance(value, str) else "",
)
def test_a_wrong_file_is_named_with_its_key(capsys, tmp_path, yaml, parts):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml)
    text = message(capsys, "--config", str(file))
    for part in ["bad.yaml", *parts]:
        assert part in text


def test_help_fits_a_person(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        run("--preset", "demo", "--lr", "1e-3", "--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "Train something small.",
        "optimiser:\n",
        "--batch-size INT",
        "images per device (default: 256)",  # the preset's, which --help was asked with
        "--amp, --no-amp",
        "100% of the matmuls (default: on)",
        "{mae,simmim}",
        "demo: Digits in minutes.",
    ):
        assert part in text
    assert "--batch_size" not in text
    assert "second paragraph" not in text
    assert text.count("data:\n") == 1, "inherited and own fields of a group stand together"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("program", "shown"), [("vim-ssl fine-tune", "vim-ssl fine-tune --data"), ("x.py", "python ")]
)
def test_help_of_an_installed_command_names_no_script(program, shown, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit):
        parse(Named, argv=["--help"], description="    python downstream/fine_tune.py --data X")
    text = capsys.readouterr().out
    assert shown in text
    assert ("downstream/" in text) is (program == "x.py")


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_saved_configs_come_back_equal(tmp_path, name):
    config = Config(lr=1e-5, betas=(0.9, 0.95), taps=(3,), model_args={"depth": 4}, data="réseau")
    save(config, tmp_path / name)
    assert from_dict(Config, read(tmp_path / name)) == config
    assert run("--config", str(tmp_path / name), default_preset="demo") == config
    assert [path.name for path in tmp_path.iterdir()] == [name], "no part file is left"


def test_to_dict_is_plain():
    values = to_dict(demo())
    assert values["size"] == [14, 14]
    assert values["output"] == "runs"
    assert json.loads(json.dumps(values)) == values


def test_from_dict_is_strict():
    with pytest.raises(ValueError, match=r"'batch_sise'.*Did you mean 'batch_size'"):
        from_dict(Config, {"batch_sise": 8})
    with pytest.raises(ValueError, match="tracker: 'wandb'"):
        from_dict(Config, {"tracker": "wandb"})


def test_mutable_defaults_are_not_shared():
    Config().model_args["depth"] = 1
    assert Config().model_args == {}


def test_a_field_without_default_is_needed(capsys):
    @dataclass
    class Needs:
        data: str

    assert parse(Needs, argv=["--data", "photos"]).data == "photos"
    with pytest.raises(SystemExit):
        parse(Needs, argv=[])
    assert "set --data" in capsys.readouterr().err


def test_a_configs_own_check_speaks_in_one_line(capsys):
    @dataclass
    class Checked:
        ratio: float = opt(0.75, "share hidden")

        def __post_init__(self):
            if not 0 < self.ratio < 1:
                raise ValueError(f"ratio {self.ratio} is not between 0 and 1.")

    with pytest.raises(SystemExit) as left:
        parse(Checked, argv=["--ratio", "2"])
    assert left.value.code == 2
    assert "ratio 2.0 is not between 0 and 1." in capsys.readouterr().err


def test_a_type_without_a_flag_is_refused_at_once():
    @dataclass
    class Odd:
        layers: list[int] = opt([], "a list")

    with pytest.raises(TypeError, match=r"Odd\.layers"):
        parse(Odd, argv=[])


def test_reserved_names_are_refused():
    @dataclass
    class Taken:
        config: str = opt("", "a field that hides a flag")

    with pytest.raises(TypeError, match="--config is reserved"):
        parse(Taken, argv=[])


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("vim_tinny", ["vim_tiny", "vim_base"], "Did you mean 'vim_tiny'?"),
        ("resnet", ["vim_tiny", "vim_base"], "Known: vim_tiny, vim_base."),
        ("x", [], "None is known."),
    ],
    ids=["near", "far", "empty"],
)
def test_did_you_mean(name, known, text):
    assert did_you_mean(name, known) == text
