"""Strict config: what builds, what does not and what the error says, config files and overrides."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from runtime_jax.config import (
    ConfigError,
    Duration,
    added,
    build,
    load,
    renamed,
    to_dict,
    with_new_names,
)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float
    kind: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr is not negative; got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int
    optimizer: Optimizer
    name: str = ""
    flag: bool = False
    clip: Optional[float] = None  # noqa: UP045  (both spellings must work)
    kept: int | tuple[int, ...] = 64
    weights: dict[str, float] = field(default_factory=dict)
    groups: tuple[Optimizer, ...] = ()
    teacher: Optimizer | None = None


GOOD = {"steps": 3, "optimizer": {"lr": 1}}


def error(**changes: Any) -> str:
    with pytest.raises(ConfigError) as info:
        build(Config, {**GOOD, **changes})
    return str(info.value)


def test_builds_nested():
    config = build(
        Config,
        ConfigDict({**GOOD, "kept": [1, 2], "weights": {"a": 1}, "groups": [{"lr": 0.1, "betas": [0.5, 1]}]}),
    )
    assert config.optimizer == Optimizer(lr=1.0) and type(config.optimizer.lr) is float
    assert config.kept == (1, 2) and config.weights == {"a": 1.0}
    assert config.groups == (Optimizer(lr=0.1, betas=(0.5, 1.0)),)
    assert build(Config, {**GOOD, "teacher": {"lr": 0.5}}).teacher == Optimizer(lr=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stepz": 4},
            "config.stepz: unknown key (value 4); did you mean 'steps'?; known: steps, optimizer, name, flag, clip, "
            "kept, weights, groups, teacher",
        ),
        ({"step": ConfigDict({"s": 4})}, "config.step: unknown key (value {'s': 4}); did you mean 'steps'?"),
        ({"z": "x" * 99}, f"config.z: unknown key (value '{'x' * 76}...); known"),
        ({"steps": ConfigDict({"s": 4})}, "config.steps: got {'s': 4} (ConfigDict), expected int"),
        ({"flags": True}, "config.flags: unknown key (value True); did you mean 'flag'?"),
        ({"optimizer": {}}, "config.optimizer.lr: missing, expected float"),
        ({"optimizer": 3}, "config.optimizer: got 3 (int), expected Optimizer with keys lr, kind, betas"),
        ({"optimizer": {"lr": "1e-3"}}, "config.optimizer.lr: got '1e-3' (str), expected float"),
        ({"optimizer": {"lr": -1}}, "config.optimizer: lr is not negative; got -1.0"),
        (
            {"optimizer": {"lr": 1, "kind": "adam"}},
            "config.optimizer.kind: got 'adam' (str), expected one of 'adamw', 'sgd'; did you mean 'adamw'?",
        ),
        (
            {"optimizer": {"lr": 1, "betas": [1]}},
            "config.optimizer.betas: got [1] (list), expected tuple[float, float]: 2 entries, not 1",
        ),
        ({"optimizer": {"lr": 1, "betas": [1, True]}}, "config.optimizer.betas.1: got True (bool), expected float"),
        ({"steps": True}, "config.steps: got True (bool), expected int"),
        ({"steps": 1.0}, "config.steps: got 1.0 (float), expected int"),
        ({"flag": 1}, "config.flag: got 1 (int), expected bool"),
        ({"name": None}, "config.name: got None (NoneType), expected str"),
        ({"clip": "x"}, "config.clip: got 'x' (str), expected float | None"),
        ({"kept": "x"}, "config.kept: got 'x' (str), expected int | tuple[int, ...]"),
        ({"kept": [1, "x"]}, "config.kept.1: got 'x' (str), expected int"),
        ({"weights": {"a": "x"}}, "config.weights.a: got 'x' (str), expected float"),
        ({"groups": [{"lr": 1}, {"l": 1}]}, "config.groups.1.l: unknown key (value 1); did you mean 'lr'?"),
        ({"teacher": {"lr": "x"}}, "config.teacher.lr: got 'x' (str), expected float"),
    ],
)
def test_error_names_path_value_and_what_is_allowed(changes, message):
    assert message in error(**changes)


def test_a_config_of_something_else_is_called_that():
    others = {"model": 1, "data": 2, "words": 3, "images": 4}
    with pytest.raises(ConfigError) as info:
        build(Config, {"steps": 1, **others}, what="a test")
    head, *problems = info.value.problems
    assert head == "config: this is not a config of a test: 4 of 5 keys are unknown"
    assert [line.split(":")[0] for line in problems] == ["config.model", "config.data", "config.words"]
    typos = {"stepz": 1, "optimiser": {}, "nam": ""}  # few enough to be listed
    with pytest.raises(ConfigError) as info:
        build(Config, typos)
    assert len(info.value.problems) == 5 and "not a config" not in str(info.value)


def test_all_problems_at_once():
    message = error(stepz=1, steps="x", optimizer={"lr": 1, "kind": 3})
    assert [line.split(":")[0] for line in message.splitlines()] == [
        "config.stepz",
        "config.steps",
        "config.optimizer.kind",
    ]


@given(
    steps=st.integers(),
    lr=st.floats(min_value=0, allow_infinity=False),
    kept=st.one_of(st.integers(), st.lists(st.integers()).map(tuple)),
    weights=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    clip=st.none() | st.floats(allow_nan=False),
)
def test_to_dict_is_the_inverse(steps, lr, kept, weights, clip):
    config = Config(steps=steps, optimizer=Optimizer(lr=lr), kept=kept, weights=weights, clip=clip)
    assert build(Config, to_dict(config)) == config


def test_duration_is_in_exactly_one_unit():
    assert Duration(steps=7).to_steps(4, 100) == 7
    assert Duration(examples=9).to_steps(4) == 3
    assert Duration(epochs=1.5).to_steps(4, 10) == 4
    with pytest.raises(ValueError, match="exactly one of steps, examples, epochs; got none"):
        Duration()
    with pytest.raises(ValueError, match=r"exactly one of steps, examples, epochs; got \{'steps': 1, 'epochs': 2"):
        Duration(steps=1, epochs=2.0)
    with pytest.raises(ValueError, match="number of examples is not known"):
        Duration(epochs=1.0).to_steps(4)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    file = tmp_path / "tiny.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg='small'):\n"
        "    groups = ({'lr': 1.0}, {'lr': 2.0})\n"
        "    c = ConfigDict({'name': arg, 'steps': 3, 'optimizer': {'lr': 0.1}, 'groups': groups})\n"
        "    c.twice = c.get_ref('steps') * 2\n"
        "    return c\n"
    )
    return str(file)


def test_load_applies_overrides(config_file):
    assert load(config_file).name == "small"
    config = load(f"{config_file}:big", ["optimizer.lr=1e-3", "steps=5", "groups.1.lr=7", "name=(1, 2)", "name=a b"])
    assert config.optimizer.lr == 1e-3 and config.name == "a b" and config.groups == ({"lr": 1.0}, {"lr": 7})
    assert config.twice == 10, "a value that refers to an overridden one follows it"
    assert load(config_file, ["steps=many"]).steps == "many", "build judges types"


def test_override_may_set_a_default_of_the_dataclass(config_file):
    file = load(config_file, ["optimizer.kind=sgd", "teacher.lr=2"], new_keys=True)
    del file["twice"]
    config = build(Config, file)
    assert config.optimizer.kind == "sgd" and config.teacher == Optimizer(lr=2.0)
    with pytest.raises(ConfigError, match=r"config.optimizer.knd: unknown key .* did you mean 'kind'"):
        build(Config, load(config_file, ["optimizer.knd=sgd"], new_keys=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizr.lr=1", "override optimizr: unknown key; did you mean 'optimizer'?; known: groups, name, "),
        ("optimizer.lrr=1", "override optimizer.lrr: unknown key; did you mean 'lr'?; known: lr"),
        ("groups.2.lr=1", "override groups.2: expected an index in 0..1, got '2'"),
        ("steps.x=1", "override steps.x: steps is 3, which has no keys"),
        ("steps", "override 'steps': expected dotted.key=value"),
        ("=3", "override '=3': expected dotted.key=value"),
    ],
)
def test_bad_override(config_file, override, message):
    with pytest.raises(ConfigError) as info:
        load(config_file, [override])
    assert message in str(info.value)


def test_bad_config_file(tmp_path, config_file):
    with pytest.raises(ConfigError, match=r"no such config file .*tinny\.py'; did you mean .*tiny\.py'"):
        load(str(tmp_path / "tinny.py:arg"))
    with pytest.raises(ConfigError, match=r"no such config file .*nosuch\.py'; there: "):
        load(str(tmp_path / "nosuch.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="defines no get_config"):
        load(str(tmp_path / "empty.py"))
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'a': 1}\n")
    assert load(str(tmp_path / "plain.py")).a == 1
    with pytest.raises(ConfigError, match="get_config takes no argument 'x'"):
        load(str(tmp_path / "plain.py:x"))


@pytest.mark.parametrize("name", ["mergevq_tiny:demo", "tokenverse_tiny:star", "judge"])
def test_a_config_by_its_name(name, tmp_path, monkeypatch):
    file, colon, arg = name.partition(":")
    by_path = load(f"{ROOT}/configs/{file}.py{colon}{arg}")
    monkeypatch.chdir(tmp_path)
    assert load(name).to_dict() == by_path.to_dict()
    Path("judge.py").write_text("def get_config():\n    return {'mine': 1}\n")
    assert load("judge.py").mine == 1  # a path is always a path


def test_a_name_or_path_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no config is named 'mine'; by name there are flux_tiny, judge, .*mine\.py"):
        load("mine:demo")
    with pytest.raises(ConfigError, match=r"no such config file 'configs/judge\.py'; by name: judge"):
        load("configs/judge.py")


@dataclass(frozen=True, kw_only=True)
class Changed:
    sizes: tuple[int, ...] = renamed(
        "bits",
        (4,),
        lambda bits: tuple(2**n for n in bits),
        lambda sizes: [n.bit_length() - 1 for n in sizes] if 6 not in sizes else None,
    )
    kind: str = added("usual")


@dataclass(frozen=True, kw_only=True)
class Whole:
    model: Changed
    seed: int = 0
    others: tuple[Changed, ...] = ()
    named: dict[str, Changed] | None = None


def test_old_files_are_read():
    assert build(Changed, {"bits": [2, 3]}) == Changed(sizes=(4, 8))
    old = {"model": {"bits": [2, 3]}, "seed": 1, "elsewhere": "kept"}
    assert with_new_names(Whole, old) == {"model": {"sizes": [4, 8]}, "seed": 1, "elsewhere": "kept"}
    nested = {"model": None, "others": [{"bits": [1]}], "named": {"a": {"bits": [2]}}}
    assert with_new_names(Whole, nested) == {
        "model": None,
        "others": [{"sizes": [2]}],
        "named": {"a": {"sizes": [4]}},
    }
    assert with_new_names(Whole, {"model": "tiny", "others": 3}) == {"model": "tiny", "others": 3}


def test_a_fingerprint_is_taken_of_the_old_names():
    assert to_dict(Whole(model=Changed(sizes=(4, 8))), old_names=True)["model"] == {"bits": [2, 3]}
    assert to_dict(Whole(model=Changed(sizes=(6,))), old_names=True)["model"] == {"sizes": [6]}


def test_an_added_field_leaves_old_files_as_they_were():
    assert to_dict(Changed(sizes=(4,))) == {"sizes": [4]}
    assert to_dict(Changed(kind="other")) == {"sizes": [4], "kind": "other"}
    assert build(Changed, to_dict(Changed(kind="other"))) == Changed(kind="other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": [2], "sizes": [4]}, r"config.bits: unknown key \(value \[2\]\); it is now 'sizes'"),
        ({"bits": ["two"]}, r"config.bits: unknown key \(value \['two'\]\); it is now 'sizes'"),
    ],
)
def test_old_names_that_cannot_be_read(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(Changed, fields)
