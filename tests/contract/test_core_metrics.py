"""`util.metrics`: what may be declared and recorded."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from core_implementation import (
    IMPLEMENTATION,
    IS_REFERENCE,
    better_than_reference,
    ray,
    start_runtime,
)

metrics: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.metrics")
Counter, Gauge, Histogram = metrics.Counter, metrics.Gauge, metrics.Histogram


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


def test_a_metric_tells_what_it_is() -> None:
    counter = Counter("contract_told", description="Things.", tag_keys=("a", "b"))
    assert counter.info == {
        "name": "contract_told",
        "description": "Things.",
        "tag_keys": ("a", "b"),
        "default_tags": {},
    }
    histogram = Histogram("contract_told_s", "Seconds.", boundaries=[0.1, 1.0])
    assert histogram.info == {
        "name": "contract_told_s",
        "description": "Seconds.",
        "tag_keys": (),
        "default_tags": {},
        "boundaries": [0.1, 1.0],
    }


def test_default_tags_are_set_on_the_metric_itself() -> None:
    gauge = Gauge("contract_defaults", tag_keys=("a",))
    assert gauge.set_default_tags({"a": "x"}) is gauge
    assert gauge.info["default_tags"] == {"a": "x"}
    gauge.set(1)


def test_a_record_needs_every_declared_tag() -> None:
    counter = Counter("contract_tags", tag_keys=("a", "b")).set_default_tags({"a": "x"})
    with pytest.raises(ValueError, match=r"Missing value for tag key\(s\): b"):
        counter.inc()
    counter.inc(tags={"b": "y"})


def test_tags_that_are_not_declared_are_ignored_in_records_and_refused_as_defaults() -> None:
    counter = Counter("contract_unknown", tag_keys=("a",))
    counter.inc(tags={"a": "x", "other": "y"})
    with pytest.raises(ValueError, match="Unrecognized tag key other"):
        counter.set_default_tags({"other": "y"})


@pytest.mark.parametrize("tags", [{"a": 1}, {"a": None}])
def test_values_of_tags_are_strings(tags: dict[str, Any]) -> None:
    gauge = Gauge("contract_strings", tag_keys=("a",))
    with pytest.raises(TypeError, match="Tag values must be str"):
        gauge.set(1, tags=tags)
    with pytest.raises(TypeError, match="Tag values must be str"):
        gauge.set_default_tags(tags)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Counter(""), ValueError, "Empty name"),
        (lambda: Counter("contract_list", tag_keys=["a"]), TypeError, "should be a tuple"),
        (lambda: Counter("contract_int", tag_keys=(1,)), TypeError, "Tag keys must be str"),
        (lambda: Counter("contract_text", description=5), (TypeError, AttributeError), ""),
        (lambda: Histogram("contract_none"), ValueError, "boundaries argument"),
        (lambda: Histogram("contract_empty", boundaries=[]), ValueError, "boundaries argument"),
        (
            lambda: Histogram("contract_zero", boundaries=[0.0, 1.0]),
            ValueError,
            "at index 0",
        ),
    ],
)
def test_declarations_that_make_no_sense_are_refused(
    make: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


@better_than_reference("it counts wrongly")
def test_boundaries_ascend() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Histogram("contract_descending", boundaries=[2.0, 1.0])


def test_a_counter_only_grows() -> None:
    counter = Counter("contract_grows")
    counter.inc()
    counter.inc(2.5)
    for value in (0, -1):
        with pytest.raises(ValueError, match="value must be >0"):
            counter.inc(value)
    with pytest.raises(TypeError, match="must be int or float"):
        counter.inc("1")


def test_a_gauge_takes_any_number_and_none() -> None:
    gauge = Gauge("contract_any")
    for value in (1, -2.5, None):
        gauge.set(value)
    with pytest.raises(TypeError, match="must be int or float"):
        gauge.set("1")


def test_a_histogram_takes_any_number() -> None:
    histogram = Histogram("contract_takes", boundaries=[1.0])
    for value in (0, -1, 5.5):
        histogram.observe(value)
    with pytest.raises(TypeError, match="must be int or float"):
        histogram.observe(None)


def test_a_name_that_cannot_be_is_warned_of_and_dropped() -> None:
    with pytest.warns(UserWarning, match="Invalid metric name: contract-dashed"):
        counter = Counter("contract-dashed")
    counter.inc()
    with pytest.warns(FutureWarning, match="contains a : character"):
        Counter("contract:colon").inc()


def test_metrics_travel_to_tasks() -> None:
    counter = Counter("contract_travels", tag_keys=("a",))

    @ray.remote
    def record(counter: Any) -> str:
        counter.inc(tags={"a": "x"})
        return str(counter.info["name"])

    assert ray.get(record.remote(counter)) == "contract_travels"
    copy = pickle.loads(pickle.dumps(Histogram("contract_copy", boundaries=[1.0])))
    assert copy.info["boundaries"] == [1.0]


@better_than_reference("they are lost")
def test_default_tags_travel_too() -> None:
    counter = Counter("contract_with_tags", tag_keys=("a",)).set_default_tags({"a": "x"})
    assert pickle.loads(pickle.dumps(counter)).info["default_tags"] == {"a": "x"}


@pytest.mark.skipif(IS_REFERENCE, reason="what comes of it is undefined")
def test_one_name_is_one_kind_of_metric() -> None:
    Counter("contract_kind")
    with pytest.raises(ValueError, match="There is a counter named 'contract_kind' already"):
        Gauge("contract_kind")
