"""The gateway's settings: what is wrong is named."""

from __future__ import annotations

import re
from typing import get_type_hints

import msgspec
import pytest

from embedq_consumer.settings import Settings
from embedq_gateway.settings import GatewaySettings, SettingsError, kafka_settings
from embedq_shared.settings.words import takes, wrong


def settings(**environ: str) -> GatewaySettings:
    return GatewaySettings.from_env(
        {f"EMBEDQ_GATEWAY_{name.upper()}": value for name, value in environ.items()}
    )


def test_nothing_need_be_set() -> None:
    assert GatewaySettings.from_env({}) == GatewaySettings()


def test_a_mistyped_name_is_an_error_that_suggests_the_right_one() -> None:
    with pytest.raises(
        SettingsError,
        match=r"^unknown setting EMBEDQ_GATEWAY_WORKER; did you mean EMBEDQ_GATEWAY_WORKERS\?$",
    ):
        settings(worker="2")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("port", "http", "an integer, at least 0, at most 65,535, got 'http'"),
        ("workers", "0", "an integer, at least 1, got '0'"),
        ("timeout_s", "inf", "a number, above 0, at most 86,400.0, got 'inf'"),
        ("access_log", "perhaps", "true or false, got 'perhaps'"),
        ("log_level", "loud", "one of debug, info, warning, error, got 'loud'"),
    ],
)
def test_a_value_out_of_range_names_its_variable_and_what_was_expected(
    name: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(**{name: value})
    assert str(caught.value) == f"EMBEDQ_GATEWAY_{name.upper()}: expected {expected}"


def test_what_does_not_fit_together_is_said() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_GATEWAY_TLS_KEYFILE: needs EMBEDQ_GATEWAY_TLS_CERTFILE"):
        settings(tls_keyfile="/k.pem")
    with pytest.raises(SettingsError, match="EMBEDQ_GATEWAY_TIMEOUT_S: expected at most"):
        settings(timeout_s="700")


def test_every_setting_says_in_a_sentence_what_it_is_and_none_in_a_librarys_words() -> None:
    for name, hint in get_type_hints(GatewaySettings, include_extras=True).items():
        metas = [meta for meta in hint.__metadata__ if isinstance(meta, msgspec.Meta)]
        [description] = [meta.description for meta in metas if meta.description]
        assert description.endswith("."), name
        said = f"{takes(hint)} {wrong(GatewaySettings, name, {name: 'x'})}"
        assert not re.search(r"`(int|str|bool|float)`|regex", said), name


def test_kafka_is_told_as_to_the_service() -> None:
    found = kafka_settings(
        {
            "EMBEDQ_KAFKA_SERVERS": "k:9092",
            "EMBEDQ_TOPIC_PREFIX": "other",
            "EMBEDQ_MODEL": "/the/services",
            "EMBEDQ_GATEWAY_PORT": "1",
            "EMBEDQ_KAFKA_VERSION": "4.1.0",
        }
    )
    assert (found.kafka_servers, found.topics.jobs) == ("k:9092", "other.jobs")


def test_a_mistyped_name_of_kafkas_is_an_error() -> None:
    with pytest.raises(SettingsError, match="unknown setting EMBEDQ_KAFKA_SERVER; did you mean"):
        kafka_settings({"EMBEDQ_KAFKA_SERVERS": "k:9092", "EMBEDQ_KAFKA_SERVER": "k:9092"})
    with pytest.raises(SettingsError, match="EMBEDQ_KAFKA_SERVERS must be set"):
        kafka_settings({})
    with pytest.raises(SettingsError, match="EMBEDQ_KAFKA_SERVERS: expected host:port"):
        kafka_settings({"EMBEDQ_KAFKA_SERVERS": "http://k:9092"})


def test_the_service_takes_no_notice_of_the_gateways_settings() -> None:
    environ = {"EMBEDQ_KAFKA_SERVERS": "k:9092", "EMBEDQ_MODEL": "/m", "EMBEDQ_GATEWAY_PORT": "1"}
    assert Settings.from_env(environ).model == "/m"
