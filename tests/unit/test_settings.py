"""Settings from the environment: what is wrong is named."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from embedq_consumer.cache import RedisOptions, SecretSource
from embedq_consumer.engine import LoadOptions
from embedq_consumer.intake.admission import AdmissionPolicy
from embedq_consumer.lifecycle import BatchOptions
from embedq_consumer.lifecycle.warming.cache_warmer import WarmOptions
from embedq_consumer.service import serve
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.shapes import RegistryOptions
from embedq_consumer.usage import explain_usage
from embedq_shared.secret import Secret
from embedq_shared.settings.words import described, takes, wrong
from embedq_shared.topics import DEFAULT_RETRY_TIERS, Topics
from tests.helpers.support import patient

NEEDED = {"EMBEDQ_KAFKA_SERVERS": "localhost:9092", "EMBEDQ_MODEL": "/models/one"}


def settings(**environ: str) -> Settings:
    return Settings.from_env(NEEDED | {f"EMBEDQ_{name.upper()}": value for name, value in environ.items()})


def test_two_variables_are_enough() -> None:
    found = settings()
    assert found.kafka_servers == "localhost:9092"
    assert found.model == "/models/one"
    assert found.topics.jobs == "embed.jobs"
    assert found.redis_url == ""


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_a_missing_one_is_named(missing: str) -> None:
    with pytest.raises(SettingsError, match=f"^{missing} must be set$"):
        Settings.from_env({name: value for name, value in NEEDED.items() if name != missing})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_batch_tokens", "-1", "an integer, at least 0, got '-1'"),
        ("max_batch_tokens", "many", "an integer, at least 0, got 'many'"),
        ("max_batch_items", "0", "an integer, at least 1, got '0'"),
        ("max_wait_ms", "-0.5", "a number, at least 0, got '-0.5'"),
        ("bulk_max_wait_s", "soon", "a number, at least 0, got 'soon'"),
        ("max_in_flight_jobs", "0", "an integer, at least 1, got '0'"),
        ("max_in_flight_bytes", "1MB", "an integer, at least 1, got '1MB'"),
        ("max_poll_records", "2.5", "an integer, at least 1, got '2.5'"),
        ("max_result_bytes", "100", "an integer, at least 4,096, got '100'"),
        ("http_port", "65536", "an integer, at least 0, at most 65,535, got '65536'"),
        ("reply_timeout_s", "0", "a number, above 0, got '0'"),
        ("session_timeout_ms", "999", "an integer, at least 1,000, got '999'"),
        ("log_level", "verbose", "one of debug, info, warning, error, got 'verbose'"),
        ("device", "gpu", "auto, cpu, cuda or cuda:N (a GPU is cuda), got 'gpu'"),
        ("devices", "gpu", "all, or cpu, cuda and cuda:N separated by commas, got 'gpu'"),
        ("deterministic", "perhaps", "true or false, got 'perhaps'"),
        ("static_membership", "2", "true or false, got '2'"),
        ("kafka_security_protocol", "TLS", "one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL, got 'TLS'"),
        ("topic_prefix", "", "text, not empty, got nothing"),
        ("group", "", "text, not empty, got nothing"),
        ("model", "", "text, not empty, got nothing"),
        ("replica", "x" * 257, f"text of at most 256 characters, got '{'x' * 80}…'"),
    ],
)
def test_a_value_out_of_range_names_its_variable_and_what_was_expected(
    name: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(**{name: value})
    assert str(caught.value) == f"EMBEDQ_{name.upper()}: expected {expected}"


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("log_level", "INFO", "info"),
        ("kafka_security_protocol", "ssl", "SSL"),
        ("quantization", "None", "none"),
        ("deterministic", "yes", True),
        ("deterministic", "No", False),
        ("deterministic", "ON", True),
        ("deterministic", "off", False),
        ("deterministic", "True", True),
        ("deterministic", "0", False),
    ],
)
def test_choices_are_read_in_any_case_of_letters_and_yes_and_no_as_everybody_does(
    name: str, value: str, meant: object
) -> None:
    assert getattr(settings(**{name: value}), name) == meant


def test_no_setting_is_explained_in_the_words_of_a_library() -> None:
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        said = f"{takes(hint)} {wrong(Settings, name, {name: 'x'})}"
        assert not re.search(r"`(int|str|bool|float)`|regex|\\d|\^", said), name


def test_a_secret_that_cannot_be_used_is_not_shown() -> None:
    assert "hidden" not in wrong(Settings, "cache_key", {"cache_key": "hidden"})


def test_help_names_every_setting_what_it_takes_and_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_usage(["--help"]) == 0
    written = capsys.readouterr().out
    for one in described(Settings, "EMBEDQ_"):
        assert f"{one.name}  ({one.takes}; " in written
    assert "EMBEDQ_KAFKA_SERVERS  (text, not empty; required)" in written
    assert "default: 9464" in written


def test_an_argument_is_a_mistake_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_usage(["--port", "1"]) == 2
    assert capsys.readouterr().err == "embedq: expected no arguments; --help shows the settings\n"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["max_wait_ms", "reply_timeout_s", "cache_ttl_s", "bulk_max_wait_s"])
def test_a_number_that_is_not_finite_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"EMBEDQ_{name.upper()}"):
        settings(**{name: value})


def test_every_setting_says_in_a_sentence_what_it_is() -> None:
    hints = get_type_hints(Settings, include_extras=True)
    for name in Settings.__struct_fields__:
        metas = [meta for meta in hints[name].__metadata__ if isinstance(meta, msgspec.Meta)]
        [description] = [meta.description for meta in metas if meta.description]
        assert description.endswith("."), name
        assert description[0].isupper() or description[0] == "`", name


def test_a_typo_is_an_error_that_suggests_the_right_name() -> None:
    with pytest.raises(
        SettingsError,
        match=r"^unknown setting EMBEDQ_MAX_BATCH_TOKNES; did you mean EMBEDQ_MAX_BATCH_TOKENS\?$",
    ):
        settings(max_batch_toknes="1")


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(SettingsError, match=r"^unknown setting EMBEDQ_QQQQQQ$"):
        settings(qqqqqq="1")


def test_the_local_stacks_own_variables_are_no_mistakes() -> None:
    assert settings(cache_dir="/somewhere", kafka_version="4.1.0") == settings()


def test_other_programs_variables_are_ignored() -> None:
    assert Settings.from_env(NEEDED | {"KAFKA_SERVERS": "x", "PATH": "/bin"}) == settings()


def test_a_rebalance_must_have_as_long_as_a_session() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_REBALANCE_TIMEOUT_MS: expected at least"):
        settings(session_timeout_ms="30000", rebalance_timeout_ms="20000")


def test_models_are_loaded_from_next_to_the_first_one_unless_a_root_is_set(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert settings(model=str(tmp_path / "real" / "one")).root == tmp_path / "real"
    assert settings(model_root=str(tmp_path / "link")).root == tmp_path / "real"


def test_reply_topics_are_patterns_separated_by_commas() -> None:
    assert settings(reply_topics=" team-*.replies, other ,").reply_patterns == ("team-*.replies", "other")
    assert settings().reply_patterns == ()


def test_layers_that_fp8_leaves_alone_are_numbers_separated_by_commas() -> None:
    assert settings(quantization="fp8", fp8_keep="0,-1,12").load.keep_bf16 == (0, -1, 12)
    assert settings().load.keep_bf16 == ()
    with pytest.raises(SettingsError, match="EMBEDQ_FP8_KEEP: needs EMBEDQ_QUANTIZATION=fp8"):
        settings(fp8_keep="0")
    with pytest.raises(SettingsError, match="EMBEDQ_FP8_KEEP"):
        settings(quantization="fp8", fp8_keep="0,down")


def test_a_cache_that_is_warmed_is_one() -> None:
    assert settings().served_models(1).aliases[0].warming is None
    warmed = settings(
        redis_url="redis://here:6379/0", cache_warm_texts="500", cache_warm_s="10"
    ).served_models(1)
    assert [one.warming for one in warmed.aliases] == [WarmOptions(texts=500, seconds=10.0)]
    with pytest.raises(SettingsError, match="EMBEDQ_CACHE_WARM_TEXTS: needs EMBEDQ_REDIS_URL"):
        settings(cache_warm_texts="500")
    with pytest.raises(SettingsError, match="EMBEDQ_CACHE_WARM_TEXTS"):
        settings(redis_url="redis://here:6379/0", cache_warm_texts="10001")


def test_the_model_of_the_settings_lies_where_its_links_lead(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    options = settings(
        model=str(tmp_path / "link"), replica="r", max_wait_ms="4", bulk_max_wait_s="7", drain_timeout_s="9"
    ).served_models(batch_tokens=512, late=True)
    assert (options.kept_models, options.pinned) == (0, frozenset())
    [found] = options.aliases
    assert found.first
    assert (found.configured, found.root) == (tmp_path / "one", tmp_path)
    assert (found.alias, found.replica, found.drain_timeout_s) == ("default", "r", 9)
    assert found.batches == BatchOptions(
        max_tokens=512, max_items=1024, max_wait_s=0.004, bulk_max_wait_s=7, late=True
    )


def test_more_aliases_begin_with_the_same_model_or_one_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    options = settings(
        model=str(tmp_path / "one"),
        alias="first",
        aliases=f"second={tmp_path / 'two'}, third ,",
        kept_models="2",
        pinned_models="two, ../else",
    ).served_models(batch_tokens=512)
    assert [(each.alias, each.first, each.configured.name) for each in options.aliases] == [
        ("first", True, "one"),
        ("second", False, "two"),
        ("third", False, "one"),
    ]
    assert len({each.root for each in options.aliases}) == 1
    assert options.kept_models == 2
    assert options.pinned == frozenset([tmp_path / "two", tmp_path.parent / "else"])


@pytest.mark.parametrize(
    ("aliases", "expected"),
    [
        ("=/m", "expected NAME or NAME=DIRECTORY"),
        ("a=", "expected NAME or NAME=DIRECTORY"),
        ("a,a=/m", "expected each name once"),
        ("default", "expected each name once, and not that of EMBEDQ_ALIAS"),
        ("a" * 257, "expected names of at most 256 characters"),
    ],
)
def test_aliases_that_cannot_be_told_apart_are_refused(aliases: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=f"EMBEDQ_ALIASES: {expected}"):
        settings(aliases=aliases)


def test_a_pool_has_its_topics_and_its_group_and_the_default_one_those_of_always() -> None:
    one = settings()
    assert (one.topics, one.consumer_group) == (Topics("embed"), "embedq")
    assert settings(pool="default") == one
    big = settings(pool="big", alias="large", group="ours")
    assert (big.topics, big.consumer_group) == (Topics("embed", "big"), "ours.big")
    assert big.intake.group == big.consumer_group
    assert big.admission.topics.jobs == "embed.jobs.big"


@pytest.mark.parametrize("pool", ["bulk", "a.b", "x" * 65, "a b"])
def test_a_pool_that_could_be_no_part_of_a_topics_name_is_refused(pool: str) -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_POOL: expected letters, digits"):
        settings(pool=pool, alias="large")


@pytest.mark.parametrize("aliases", [{}, {"alias": "large", "aliases": "default"}])
def test_the_alias_of_jobs_that_name_no_model_lives_in_the_default_pool(aliases: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_ALIAS: expected no alias default with EMBEDQ_POOL"):
        settings(pool="big", **aliases)


def test_models_are_loaded_as_the_settings_say() -> None:
    assert settings(model="/m/a").load == LoadOptions(root=Path("/m"), dry_run_s=180.0)
    assert settings(
        device="cuda:1",
        threads="3",
        deterministic="true",
        compile_cache="/c",
        model_root="/r",
        load_timeout_s="90",
    ).load == LoadOptions(
        device="cuda:1",
        threads=3,
        deterministic=True,
        known_models=Path("/c/models"),
        root=Path("/r"),
        dry_run_s=90.0,
    )


def test_the_intake_gets_its_limits_and_its_interval_in_seconds() -> None:
    found = settings(
        group="g",
        replica="r",
        max_in_flight_jobs="7",
        max_uncommitted_jobs="9",
        commit_interval_ms="250",
        read_ahead_s="3",
        stuck_after_s="4",
        stuck_limit_s="5",
    ).intake
    assert (found.group, found.replica, found.static_membership) == ("g", "r", False)
    assert (found.max_in_flight_jobs, found.max_uncommitted) == (7, 9)
    assert (found.commit_interval_s, found.read_ahead_s) == (0.25, 3)
    assert (found.stuck_after_s, found.stuck_limit_s) == (4, 5)


def test_retry_tiers_have_their_delays_in_seconds_and_may_be_none() -> None:
    assert len(settings().retry_delays) == DEFAULT_RETRY_TIERS
    assert settings(retry_delays_s="30,300").retry_delays == (30.0, 300.0)
    assert settings(retry_delays_s="0.5").retry_delays == (0.5,)
    assert settings(retry_delays_s="").retry_delays == ()


@pytest.mark.parametrize("wrong", ["30;300", "-1", "30,", "inf", "1,2,3,4,5,6,7,8,9", "86401"])
def test_a_delay_that_makes_no_sense_is_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_RETRY_DELAYS_S: expected"):
        settings(retry_delays_s=wrong)


def test_a_static_member_needs_a_name_that_it_keeps() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_STATIC_MEMBERSHIP: needs EMBEDQ_REPLICA"):
        settings(static_membership="true")
    assert settings(static_membership="true", replica="embedq-0").intake.static_membership


def test_a_stuck_job_is_reported_before_it_is_given_up() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_STUCK_LIMIT_S: expected at least EMBEDQ_STUCK_AFTER_S"):
        settings(stuck_after_s="10", stuck_limit_s="5")


def test_the_cache_gets_its_address_and_its_times_in_seconds() -> None:
    found = settings(redis_url="redis://r", cache_ttl_s="60", cache_timeout_ms="20").cache
    assert (found.redis.url, found.ttl_s, found.timeout_s) == ("redis://r", 60, 0.02)


def test_the_cache_gets_its_user_and_its_files() -> None:
    given = {name: name for name in ("username", "password", "ssl_cafile", "ssl_certfile", "ssl_keyfile")}
    found = settings(redis_url="rediss://r", **{f"redis_{name}": value for name, value in given.items()})
    assert found.cache.redis == RedisOptions(url="rediss://r", **given)


def test_the_key_of_the_cache_is_given_or_kept_where_compiled_code_is() -> None:
    home = {"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}
    assert settings().cache_secret(home) == SecretSource(kept=Path("/c/embedq/cache-key"))
    kept = settings(compile_cache="/cache").cache_secret(home).kept
    assert kept == Path("/cache/cache-key")
    assert settings(cache_key="k").cache_secret(home).text == "k"


def test_health_pages_are_for_this_machine_alone_unless_told_otherwise() -> None:
    assert settings().http_host == "127.0.0.1"
    assert settings(http_host="0.0.0.0").http_host == "0.0.0.0"


def test_admission_follows_the_settings() -> None:
    found = settings(max_inputs="3", max_text_bytes="99", reply_topics="a,b", topic_prefix="t")
    assert found.admission == AdmissionPolicy(
        topics=Topics("t"),
        max_inputs=3,
        max_text_bytes=99,
        max_result_bytes=900_000,
        reply_patterns=("a", "b"),
    )


def test_kafkas_clients_get_a_password_only_where_sasl_asks_for_one() -> None:
    secrets = {
        "kafka_sasl_username": "u",
        "kafka_sasl_password": "p",
        "kafka_sasl_mechanism": "SCRAM-SHA-512",
    }
    assert settings(**secrets).kafka() == {
        "bootstrap_servers": "localhost:9092",
        "security_protocol": "PLAINTEXT",
    }
    assert settings(kafka_security_protocol="SASL_PLAINTEXT", **secrets).kafka() == {
        "bootstrap_servers": "localhost:9092",
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "u",
        "sasl_plain_password": "p",
    }


def test_tls_brings_a_context_that_checks_the_brokers_name() -> None:
    context = settings(kafka_security_protocol="SSL").kafka()["ssl_context"]
    assert context.check_hostname


def test_a_replica_without_a_name_gets_one_of_its_own() -> None:
    first, second = settings().named(), settings().named()
    assert first.replica
    assert first.replica != second.replica
    assert settings(replica="r1").named().replica == "r1"


def test_the_process_ends_with_code_2_and_one_line_for_a_wrong_setting() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "embedq_consumer"],
        env=NEEDED | {"EMBEDQ_MAX_WAIT_MS": "never", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "embedq: EMBEDQ_MAX_WAIT_MS: expected a number, at least 0, got 'never'"
    ]


async def test_a_port_that_is_taken_is_named_before_anything_is_connected(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        wanted = Settings(kafka_servers="127.0.0.1:1", model=str(tmp_path), http_port=port)
        with pytest.raises(
            SettingsError, match=f"^EMBEDQ_HTTP_PORT: expected a port that is free, {port} is in use"
        ):
            await serve(wanted, asyncio.Event())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"model": "/nowhere"}, "EMBEDQ_MODEL: expected a directory, /nowhere is not one"),
        ({"model_root": "/nowhere"}, "EMBEDQ_MODEL_ROOT: expected a directory, /nowhere is not one"),
        (
            {"kafka_servers": "kafka"},
            "EMBEDQ_KAFKA_SERVERS: expected host:port.*got 'kafka', which has no port",
        ),
        ({"redis_url": Secret("nonsense")}, "EMBEDQ_REDIS_URL: expected an address"),
        (
            {"http_host": "192.0.2.1"},
            "EMBEDQ_HTTP_HOST: expected an address of this machine, 192.0.2.1 is none",
        ),
        (
            {"redis_url": Secret("redis://r"), "redis_ssl_cafile": "/a"},
            "EMBEDQ_REDIS_SSL_CAFILE: needs an address",
        ),
        (
            {"redis_url": Secret("redis://r"), "cache_key": Secret("short")},
            "EMBEDQ_CACHE_KEY: expected at least 16 bytes",
        ),
    ],
)
async def test_settings_that_cannot_be_used_are_named_before_anything_is_connected(
    wrong: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    usable: dict[str, Any] = {
        "kafka_servers": "127.0.0.1:1",
        "model": str(tmp_path),
        "http_port": 0,
        "http_host": "127.0.0.1",
    }
    with pytest.raises(SettingsError, match=reason):
        await serve(Settings(**(usable | wrong)), asyncio.Event())


MAPPING = "mappings: {rows: {text: text, output: {topic: out, format: FORMAT}}}"


def test_mappings_are_read_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "embedq.yaml"
    assert not settings().read_mappings()
    path.write_text(MAPPING.replace("FORMAT", "json"))
    assert settings(mappings=str(path)).read_mappings().names == ("rows",)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("mappings: {rows: {}}", "EMBEDQ_MAPPINGS: .*mappings.rows: object missing required field `output`"),
        (None, "EMBEDQ_MAPPINGS: .*expected a file that can be read"),
        (MAPPING.replace("FORMAT", "avro"), "EMBEDQ_SCHEMA_REGISTRY_URL: must be set, .* the mapping rows"),
    ],
)
def test_a_wrong_mapping_ends_the_start_with_its_place(
    tmp_path: Path, source: str | None, wrong: str
) -> None:
    path = tmp_path / "embedq.yaml"
    if source is not None:
        path.write_text(source)
    with pytest.raises(SettingsError, match=wrong):
        settings(mappings=str(path)).read_mappings()


def test_a_schema_registry_has_an_address_and_a_login() -> None:
    assert settings().schema_registry is None
    found = settings(
        schema_registry_url="https://r", schema_registry_username="u", schema_registry_password="p"
    )
    assert found.schema_registry == RegistryOptions(url="https://r", username="u", password=Secret("p"))
