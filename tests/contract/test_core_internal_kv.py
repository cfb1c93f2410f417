"""The cluster's key-value store, as programs know it from the reference."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from core_implementation import IMPLEMENTATION, better_than_reference, get, ray, start_runtime

kv: Any = importlib.import_module(f"{IMPLEMENTATION}.experimental.internal_kv")


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


def test_a_value_is_found_under_its_key_and_namespace_alone() -> None:
    assert kv._internal_kv_initialized()
    assert kv._internal_kv_put("key", "value", namespace="one") is False
    assert kv._internal_kv_get("key", namespace="one") == b"value"
    assert kv._internal_kv_get(b"key", namespace=b"one") == b"value"
    assert kv._internal_kv_get("key", namespace="two") is None
    assert kv._internal_kv_get("key") is None
    assert kv._internal_kv_exists("key", namespace="one") is True
    assert kv._internal_kv_exists("key", namespace="two") is False


def test_a_put_tells_whether_there_was_a_value() -> None:
    assert kv._internal_kv_put("told", b"1") is False
    assert kv._internal_kv_put("told", b"2") is True
    assert kv._internal_kv_put("told", b"3", overwrite=False) is True
    assert kv._internal_kv_get("told") == b"2"
    assert kv._internal_kv_put("told new", b"3", overwrite=False) is False


def test_keys_are_listed_and_deleted_by_prefix() -> None:
    for key in ("a/1", "a/2", "b/1"):
        kv._internal_kv_put(key, b"", namespace="prefixes")
    assert sorted(kv._internal_kv_list("a/", namespace="prefixes")) == [b"a/1", b"a/2"]
    assert sorted(kv._internal_kv_list("", namespace="prefixes")) == [b"a/1", b"a/2", b"b/1"]
    assert kv._internal_kv_del("b/1", namespace="prefixes") == 1
    assert kv._internal_kv_del("b/1", namespace="prefixes") == 0
    assert kv._internal_kv_del("a/", del_by_prefix=True, namespace="prefixes") == 2
    assert kv._internal_kv_list("", namespace="prefixes") == []


def test_workers_see_what_the_driver_put_and_the_other_way_round() -> None:
    @ray.remote
    def there() -> Any:
        kv._internal_kv_put("from worker", b"w", namespace="both")
        return kv._internal_kv_get("from driver", namespace="both")

    kv._internal_kv_put("from driver", b"d", namespace="both")
    assert get(there.remote()) == b"d"
    assert kv._internal_kv_get("from worker", namespace="both") == b"w"


def test_large_values_are_read_whole_everywhere() -> None:
    value = bytes(range(256)) * 4096

    @ray.remote
    def there() -> bool:
        return bool(kv._internal_kv_get("large") == value)

    kv._internal_kv_put("large", value)
    assert kv._internal_kv_get("large") == value
    assert get(there.remote())


def test_large_values_are_put_by_workers() -> None:
    value = bytes(range(256)) * 8192

    @ray.remote
    def there(key: str) -> bool:
        return bool(kv._internal_kv_put(key, value, namespace="large"))

    assert get([there.remote(key) for key in ("one", "two", "one")]) in (
        [False, False, True],
        [True, False, False],
    )
    assert kv._internal_kv_get("one", namespace="large") == value
    assert kv._internal_kv_get("two", namespace="large") == value


@better_than_reference("it fails with an assertion")
@pytest.mark.parametrize("key", [1, None, ["k"]])
def test_other_keys_and_values_are_type_errors(key: Any) -> None:
    with pytest.raises(TypeError, match="must be bytes or str"):
        kv._internal_kv_put(key, b"v")
    with pytest.raises(TypeError, match="must be bytes or str"):
        kv._internal_kv_put("k", key)
    with pytest.raises(TypeError, match="must be bytes or str"):
        kv._internal_kv_get(key)
    with pytest.raises(TypeError, match="overwrite"):
        kv._internal_kv_put("k", "v", overwrite="yes")
