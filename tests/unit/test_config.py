"""The configuration: defaults, then the environment, then arguments; wrong values are refused."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from typing import Any

import pytest

from poolray import config as config_module
from poolray.config import Config

FIELDS = [field.name for field in dataclasses.fields(Config)]


def test_the_defaults_need_nothing() -> None:
    assert Config.load({}) == Config()


def test_a_variable_overrides_the_default_and_an_argument_the_variable() -> None:
    environment = {"POOLRAY_max_retries": "7", "POOLRAY_spin_s": "0.5", "UNRELATED": "x"}
    assert Config.load(environment).max_retries == 7
    assert Config.load(environment).spin_s == 0.5
    assert Config.load(environment, max_retries=1).max_retries == 1
    assert Config.load(environment, max_retries=None).max_retries == 7


def test_a_variable_may_be_in_capitals() -> None:
    assert Config.load({"POOLRAY_MAX_RETRIES": "2"}).max_retries == 2
    both = {"POOLRAY_MAX_RETRIES": "2", "POOLRAY_max_retries": "3"}
    assert Config.load(both).max_retries == 3


def test_the_references_name_of_a_variable_is_known_too() -> None:
    assert Config.load({"POOLRAY_TASK_MAX_RETRIES": "7"}).max_retries == 7
    assert (
        Config.load({"POOLRAY_task_max_retries": "7", "POOLRAY_max_retries": "5"}).max_retries == 5
    )


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOLRAY_workers_max", "3")
    assert Config.load().workers_max == 3
    assert Config().workers_max != 3


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_can_be_set_by_a_variable_and_keeps_its_type(name: str) -> None:
    default = getattr(Config(), name)
    loaded = getattr(Config.load({f"POOLRAY_{name}": "2"}), name)
    assert loaded == 2
    assert type(loaded) is type(default)


@pytest.mark.parametrize("text", ["many", "", "1.5", "0x10", "1e3", "nan"])
def test_a_number_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"POOLRAY_max_retries is '.*': it must be a whole number"):
        Config.load({"POOLRAY_max_retries": text})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1"])
def test_times_are_finite_and_not_negative(text: str) -> None:
    with pytest.raises(ValueError, match=r"spin_s is .*: it must be at least 0"):
        Config.load({"POOLRAY_spin_s": text})


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_least_value(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is -2"):
        Config(**{name: -2})


@pytest.mark.parametrize(
    "name", ["packet_calls_max", "packet_bytes_max", "inline_max_bytes", "imap_window_items"]
)
def test_sizes_that_cannot_be_nothing_are_at_least_one(name: str) -> None:
    assert getattr(Config(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=f"{name} is 0: it must be at least 1"):
        Config(**{name: 0})


def test_retries_may_go_on_for_ever() -> None:
    assert Config(max_retries=-1).max_retries == -1


def test_an_argument_that_is_no_field_is_refused() -> None:
    with pytest.raises(TypeError, match="max_retrys"):
        Config.load({}, max_retrys=1)


def test_a_config_does_not_change_and_travels() -> None:
    config = Config.load({}, num_cpus=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_cpus = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(Config.load({}, num_cpus=2))


def test_every_field_says_why_it_is_what_it_is_and_has_a_unit_or_none() -> None:
    source = inspect.getsource(config_module)
    for name in FIELDS:
        assert re.search(rf"    #: .+\n(    #: .+\n)*    {name}: (int|float) = ", source), name


def test_limits_name_fields_only() -> None:
    minimum: dict[str, Any] = config_module._MINIMUM
    assert set(minimum) <= set(FIELDS)
