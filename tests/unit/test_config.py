"""config.toml and the environment: what they mean, which stands above which, and every mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import NoSuchNameError, UsageError
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.artifacts.recipe import NamedFile, Recipe
from fluxmesh_coordinator.cli import cli
from fluxmesh_coordinator.cli import generate as generate_module
from fluxmesh_coordinator.cli.parameters.defaults import PAINTING, Defaults, known_settings
from fluxmesh_coordinator.cli.parameters.options import painting_settings
from fluxmesh_coordinator.commands import config_file, train
from fluxmesh_coordinator.commands.settings import GenerateSettings
from tests.datasets import make_dataset
from tests.unit.test_recipe import RECIPE


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder without anything in it."""
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def write(home: Path, text: str) -> None:
    (home / "config.toml").write_text(text, encoding="utf-8")


def run(*words: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(cli, words, catch_exceptions=True)


class AskedError(Exception):
    """Carries what a command would have done."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that `generate` would paint with."""

    def settings(*words: str, env: dict[str, str] | None = None) -> GenerateSettings:
        kept: list[GenerateSettings] = []

        def keep(context: click.Context, earlier: Recipe | None = None) -> GenerateSettings:
            kept.append(painting_settings(context, earlier))
            raise AskedError

        monkeypatch.setattr(generate_module, "painting_settings", keep)
        done = run("generate", *words, env=env)
        if not isinstance(done.exception, AskedError):
            assert done.exception is not None
            raise done.exception
        return kept[0]

    return settings


def test_the_command_line_stands_above_the_environment_and_that_above_the_file(
    home: Path, asked: Any
) -> None:
    assert asked("a cat") == GenerateSettings()
    write(home, 'model = "dev"\nsteps = 3\nimage_size = "64x32"\nn-images = 2\nlow-memory = true\n')
    env = {"FLUXMESH_STEPS": "5", "FLUXMESH_MODEL": "krea-dev", "FLUXMESH_GUIDANCE": ""}
    of_file = asked("a cat")
    assert (of_file.model, of_file.steps, of_file.image_size) == ("dev", 3, (64, 32))
    assert (of_file.n_images, of_file.low_memory, of_file.guidance) == (2, True, None)
    of_env = asked("a cat", env=env)
    assert (of_env.model, of_env.steps, of_env.image_size) == ("krea-dev", 5, (64, 32))
    given = asked("a cat", "--steps", "7", "--no-low-memory", env=env)
    assert (given.model, given.steps, given.low_memory) == ("krea-dev", 7, False)


def test_bits_of_the_file_can_be_put_aside(home: Path, asked: Any) -> None:
    write(home, "bits = 4\n")
    assert asked("a cat").effective_bits == 4
    assert asked("a cat", "--bits", "8").effective_bits == 8
    assert asked("a cat", "--no-quantize").effective_bits is None


def test_bits_of_text_encoders_may_stand_in_the_file_too(home: Path, asked: Any) -> None:
    write(home, "bits = 4\ntext-bits = 8\n")
    assert asked("a cat").text_bits == 8
    assert asked("a cat", "--text-bits", "3").text_bits == 3
    assert asked("a cat", "--no-quantize").text_bits is None
    assert asked("a cat", "--no-quantize", "--text-bits", "3").text_bits == 3


@pytest.mark.parametrize(
    ("words", "bits"), [((), 4), (("--no-quantize",), None), (("--bits", "8"), 8)]
)
def test_up_loads_what_the_file_names(
    home: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], bits: int | None
) -> None:
    asked: list[ModelVariant] = []

    def stop(bringup: Any) -> Any:  # before it starts an agent
        asked.append(bringup.wish.weights)
        raise AskedError

    monkeypatch.setattr("fluxmesh_coordinator.deploy.bringup.Bringup.run", stop)
    write(home, 'model = "tiny"\ndtype = "float32"\nbits = 4\n')
    assert isinstance(run("up", *words).exception, AskedError)
    assert (asked[0].model, asked[0].dtype, asked[0].bits) == ("tiny", "float32", bits)


def test_a_picture_that_is_made_again_keeps_its_own_settings(
    home: Path, asked: Any, tmp_path: Path
) -> None:
    import numpy as np

    write(home, 'model = "dev"\nsteps = 3\n')
    path = tmp_path / "old.png"
    path.write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8), RECIPE.to_json()))
    own = GenerateSettings.of_recipe(RECIPE)
    again = asked("--from", str(path), env={"FLUXMESH_MODEL": "krea-dev"})
    assert again == own
    assert asked("--from", str(path), "--steps", "9").steps == 9


def test_what_a_picture_was_made_with_gives_way_to_an_option_of_another_name(
    asked: Any, tmp_path: Path
) -> None:
    import numpy as np

    path = tmp_path / "old.png"
    made = replace(RECIPE, control=NamedFile("edges.png", "ab"), bits=4, text_bits=8)
    path.write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8), made.to_json()))
    assert asked("--from", str(path)) == GenerateSettings.of_recipe(made)
    settings = asked("--from", str(path), "--control-from", str(path), "--no-quantize")
    assert (settings.control, settings.control_from) == (None, str(path))
    assert (settings.effective_bits, settings.text_bits) == (None, None)
    both = ("--control", str(path), "--control-from", str(path), "--no-quantize", "--text-bits=6")
    settings = asked("--from", str(path), *both)  # who gives both is told so
    assert (settings.control, settings.control_from) == (str(path), str(path))
    assert settings.text_bits == 6


def test_a_mesh_that_is_up_stands_above_the_file_alone(
    home: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Member(0, "mac1:47100", "", "", "", "")
    up = MeshRecord("macs.json", '[{"ssh": "mac1"}]', (member,), weights=ModelVariant("dev"))
    write(home, 'model = "schnell"\nbits = 4\nsteps = 3\n')
    monkeypatch.setattr(mesh_file, "load", lambda: up)
    settings = asked("a cat")
    assert (settings.model, settings.bits, settings.steps) == (None, None, 3)
    assert asked("a cat", env={"FLUXMESH_MODEL": "tiny"}).model == "tiny"
    named = asked("a cat", "--model", "krea-dev")
    assert (named.model, named.bits) == ("krea-dev", 4)
    monkeypatch.setattr(mesh_file, "load", lambda: None)
    assert asked("a cat").model == "schnell"


def test_a_training_has_a_section_and_shares_the_model(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []

    def keep(_dataset: str, chosen: Any) -> Any:
        kept.append(dict(chosen))
        raise AskedError

    monkeypatch.setattr(train, "request_of", keep)
    monkeypatch.setattr(
        "fluxmesh_coordinator.cli.parameters.defaults.Setting._check", lambda *_: None
    )

    def chosen(env: dict[str, str] | None = None, *words: str) -> dict[str, Any]:
        run("train", "dogs", *words, env=env)
        values = kept.pop()
        return {name: values[name] for name in ("model", "lora_rank") if name in values}

    write(home, 'model = "schnell"\nsteps = 3\n[train]\nlora-rank = 16\n')
    assert chosen() == {"model": "schnell", "lora_rank": 16}
    assert chosen({"FLUXMESH_TRAIN_LORA_RANK": "32"}) == {"model": "schnell", "lora_rank": 32}
    write(home, 'model = "schnell"\n[train]\nmodel = "dev"\n')
    assert chosen()["model"] == "dev"
    assert chosen({"FLUXMESH_MODEL": "tiny"})["model"] == "tiny"
    env = {"FLUXMESH_MODEL": "tiny", "FLUXMESH_TRAIN_MODEL": "krea-dev"}
    assert chosen(env)["model"] == "krea-dev"
    assert chosen(env, "--model", "x/y")["model"] == "x/y"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('modle = "x"\n', "line 1: modle is no setting; did you mean model?"),
        ("# mine\n\nsteps = 0\n", "line 3: steps is 0; it must be 1 to 1000."),
        ("steps = true\n", "line 1: steps takes one text or number."),
        ("steps = [1, 2]\n", "line 1: steps takes one text or number."),
        ('steps = "many"\n', "line 1: steps: 'many' is not a valid integer."),
        ("model = 3\n", "line 1: model takes a text, in quotes."),
        ("output = 3\n", "line 1: output takes a text, in quotes."),
        ("low-memory = 1\n", "line 1: low-memory takes true or false."),
        ("bits = 7\n", "line 1: bits: '7' is not one of"),
        ('image-size = "big"\n', "line 1: image-size: 'big' is not HEIGHTxWIDTH"),
        ("model = schnell\n", "line 1: this is not TOML (Invalid value); a text stands in quotes"),
        ("steps = 3\nsteps = 4\n", "line 2: this is not TOML (Cannot overwrite a value)"),
        ("[trian]\nlora-rank = 3\n", "line 2: there is no section [trian]; did you mean train?"),
        ("[train]\nsteps = 3\n", "line 2: train.steps is no setting; steps stands above all"),
        ("lora-rank = 3\n", "line 1: lora-rank is no setting; lora-rank stands under [train]."),
        ("[train]\nlora-rank = 0\n", "line 2: train.lora-rank is 0; it must be 1 to 1024."),
        ("force = true\n", "line 1: force is no setting; `fluxmesh config` lists"),
        ("a.b.c = 1\n", "there is no section [a]; there is [train] alone."),
    ],
)
def test_a_mistake_is_told_with_line_and_key(home: Path, text: str, sentence: str) -> None:
    write(home, text)
    with pytest.raises(UsageError) as error:
        Defaults.read(environ={})
    assert str(error.value).startswith(f"{home / 'config.toml'}")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_in_the_environment_names_the_variable(home: Path) -> None:
    with pytest.raises(UsageError, match=r"^FLUXMESH_IMAGE_SIZE: image-size: 'big' is not"):
        Defaults.read(environ={"FLUXMESH_IMAGE_SIZE": "big"})


def test_a_file_with_a_mistake_does_not_hide_help_or_other_commands(home: Path) -> None:
    write(home, "model = schnell\n")
    assert isinstance(run("generate", "a cat").exception, UsageError)
    assert run("generate", "--help").exit_code == 0
    assert run("status").exit_code == 0  # says that no mesh is up
    (home / "config.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        Defaults.read(environ={})


def test_every_setting_is_an_option_that_the_command_line_can_overrule() -> None:
    settings = known_settings()
    assert {key for section, key in settings if not section} == set(PAINTING)
    for setting in settings.values():
        assert not setting.option.is_flag or setting.option.secondary_opts, setting.title
    assert len({setting.variable for setting in settings.values()}) == len(settings)


def test_config_shows_each_value_and_where_it_comes_from(home: Path) -> None:
    write(home, '# mine\nmodel = "dev"\n[train]\nlora-rank = 16\n')
    env = {"FLUXMESH_STEPS": "5"}
    lines = [json.loads(line) for line in run("config", "--json", env=env).output.splitlines()]
    by_key = {line["key"]: (line["value"], line["source"]) for line in lines}
    path = home / "config.toml"
    assert by_key["model"] == ("dev", f"{path}, line 2")
    assert by_key["steps"] == (5, "FLUXMESH_STEPS")
    assert by_key["train.lora-rank"] == (16, f"{path}, line 4")
    assert by_key["n-images"] == ("1", "default")
    shown = run("config", env=env).output
    assert f"The file is {path}; " in shown
    assert any(line.split() == ["steps", "5", "FLUXMESH_STEPS"] for line in shown.splitlines())


def test_set_keeps_what_else_stands_in_the_file(home: Path) -> None:
    write(home, '# mine\nmodel = "dev"  # old\n\n[train]\n# rank\nlora_rank = 8\n')
    for key, value in (
        *(("steps", "3"), ("model", 'say "x" é'), ("train.lora-rank", "16")),
        *(("train.trigger", "sks"), ("low-memory", "true"), ("bits", "4"), ("wait", "2.5")),
    ):
        assert run("config", "set", key, value).exit_code == 0
    assert (home / "config.toml").read_text(encoding="utf-8") == (
        '# mine\nmodel = "say \\"x\\" é"\nsteps = 3\nlow-memory = true\nbits = 4\nwait = 2.5\n\n'
        '[train]\n# rank\nlora-rank = 16\ntrigger = "sks"\n'
    )
    assert (home / "config.toml").stat().st_mode & 0o777 == 0o600
    assert run("config", "unset", "steps").exit_code == 0
    assert "steps" not in (home / "config.toml").read_text(encoding="utf-8")
    values = {title: each.value for title, each in Defaults.read(environ={}).by_title.items()}
    assert values["train.lora-rank"] == 16 and values["wait"] == 2.5


def test_set_refuses_what_would_not_be_read(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, sentence in (
        (("modl", "x"), "modl is no setting; did you mean model?"),
        (("steps", "0"), "The value: steps is 0; it must be"),
        (("low-memory", "maybe"), "The value: low-memory: "),
    ):
        done = run("config", "set", *words)
        assert isinstance(done.exception, UsageError) or done.exit_code == 2
        assert sentence in str(done.exception)
    assert not (home / "config.toml").exists()
    write(home, 'train.lora-rank = 8\n"steps" = 3\n')
    assert "in a way of its own" in str(run("config", "set", "train.lora-rank", "9").exception)
    assert "in a way of its own" in str(run("config", "unset", "train.lora-rank").exception)
    assert run("config", "set", "steps", "4").exit_code == 0
    assert (home / "config.toml").read_text() == "train.lora-rank = 8\nsteps = 4\n"


def test_a_folder_for_pictures_is_one_wherever_a_command_runs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("config", "set", "output", "pictures").exit_code == 0
    assert Defaults.read(environ={}).by_title["output"].value == f"{tmp_path}/pictures/"
    write(home, 'output = "~/shots"\n')
    assert Defaults.read(environ={}).by_title["output"].value == f"{tmp_path}/shots/"
    done = run("generate", "a cat")
    assert "the folder does not exist" in str(done.exception)


def test_a_new_section_begins_after_an_empty_line() -> None:
    assert config_file.changed("", "train", "ema", 0.5) == "[train]\nema = 0.5\n"
    assert config_file.changed("a = 1", "train", "ema", 0.5) == "a = 1\n\n[train]\nema = 0.5\n"
    assert config_file.changed("[train]\nema = 1\n", "", "a", 1) == "a = 1\n[train]\nema = 1\n"


# What is wrong only once the command runs


WRONG_MODEL = "No model is called 'tinny'; did you mean tiny?"


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        (("generate", "a cat"), "FLUXMESH_MODEL"),
        (("plan", "a cat"), "FLUXMESH_MODEL"),
        (("up",), "FLUXMESH_MODEL"),
        (("interactive",), "FLUXMESH_MODEL"),
        (("train", "data"), "FLUXMESH_MODEL"),
        (("train", "data"), "FLUXMESH_TRAIN_MODEL"),
    ],
)
def test_a_model_that_is_none_is_told_with_the_variable_that_names_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, variable: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "data")
    done = run(*words, env={variable: "tinny"})
    assert isinstance(done.exception, NoSuchNameError)
    assert str(done.exception).startswith(f"{variable}: {WRONG_MODEL}")
    if words[0] != "train":
        done = run(*words, "--model", "tiiny", env={variable: "tinny"})
        assert str(done.exception).startswith("No model is called 'tiiny'")


def test_a_model_of_the_file_is_told_with_its_line(home: Path) -> None:
    write(home, '# mine\nmodel = "tinny"\n')
    where = f"{home / 'config.toml'}, line 2"
    assert str(run("plan").exception).startswith(f"{where}: {WRONG_MODEL}")
    write(home, 'model = "redux"\n')
    assert str(run("plan").exception).startswith(f"{home / 'config.toml'}, line 1: FLUX.1 Redux")


def test_another_wrong_value_is_told_with_its_variable_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("generate", "a cat", env={"FLUXMESH_OUTPUT": "missing"})
    text = "FLUXMESH_OUTPUT: output missing/: the folder does not exist; make it first."
    assert str(done.exception) == text
    # What a request calls otherwise than the option.
    done = run("generate", "a cat", "--model", "schnell", env={"FLUXMESH_NEGATIVE_PROMPT": "blur"})
    text = "FLUXMESH_NEGATIVE_PROMPT: negative-prompt: schnell takes no negative prompt; "
    assert str(done.exception).startswith(text)
    # Another option is to blame, whatever the environment says beside it.
    done = run("generate", "a cat", "-o", "missing/a.png", env={"FLUXMESH_MODEL": "tinny"})
    assert str(done.exception).startswith("`output` missing/a.png: the folder missing does not")
