"""Settings: bounds, sources and their order, and secrets that stay secret."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.settings import KEY_LENGTH_MAX, KEY_LENGTH_MIN, Settings, read_settings

KEY = "k" * KEY_LENGTH_MIN


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFERPIPE_CONFIG", raising=False)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"INFERPIPE_{name.upper()}", raising=False)


def a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "inferpipe.yaml"
    path.write_text(text)
    monkeypatch.setenv("INFERPIPE_CONFIG", str(path))


def test_the_defaults_are_within_their_own_bounds() -> None:
    settings = read_settings()
    Settings(**settings.model_dump())
    assert (settings.host, settings.port, settings.dev) == ("127.0.0.1", 8000, False)
    assert settings.is_loopback
    assert settings.lease_ttl_ms >= 3 * settings.heartbeat_ms


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("port", 1, 65_535),
        ("timeout_default_ms", 1, None),
        ("body_max_bytes", 1024, None),
        ("json_depth_max", 4, 512),
        ("requests_max", 1, None),
        ("partitions", 1, 256),
        ("backlog_max", 1, None),
        ("retention_s", 60, None),
        ("ingress_replicas", 1, None),
        ("executor_replicas", 1, None),
        ("executor_capacity", 1, None),
        ("lease_ttl_ms", 200, None),
        ("heartbeat_ms", 20, None),
        ("model_replicas", 0, None),
        ("context_max", 0, None),
        ("engine_seqs_max", 1, None),
    ],
)
def test_a_number_is_taken_within_its_bounds_only(name: str, low: int, high: int | None) -> None:
    for value in (low, *(() if high is None else (high,))):
        assert getattr(Settings(**{name: value}), name) == value
    for value in (low - 1, *(() if high is None else (high + 1,))):
        with pytest.raises(ValidationError):
            Settings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workspace_id", "Upper"),
        ("workspace_id", ""),
        ("workspace_id", "w" * 64),
        ("log_level", "LOUD"),
        ("redis_fsync", "never"),
        ("device", "tpu"),
        ("keep_alive_s", 0),
        ("keep_alive_s", 15.1),
        ("gpu_memory_utilization", 1.1),
    ],
)
def test_a_wrong_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Settings(**{name: value})


@pytest.mark.parametrize("length", [0, KEY_LENGTH_MIN, KEY_LENGTH_MAX])
def test_a_key_of_the_right_length_is_taken(length: int) -> None:
    assert len(Settings(api_key="k" * length).api_key.get_secret_value()) == length


@pytest.mark.parametrize("key", ["k" * 15, "k" * 129, "k" * 16 + "\n", "k" * 16 + "\x00"])
def test_a_key_that_is_too_short_too_long_or_unprintable_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="16 to 128 printable") as refused:
        Settings(api_key=key)
    assert key not in str(refused.value)


def test_no_secret_is_shown() -> None:
    secrets = {"api_key": KEY, "cluster_secret": "hush-hush", "redis_url": "redis://:pw@host"}
    shown = repr(Settings(**secrets))
    assert [secret for secret in secrets.values() if secret in shown] == []


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERPIPE_PORT", "9000")
    monkeypatch.setenv("INFERPIPE_DEV", "true")
    monkeypatch.setenv("INFERPIPE_CORS_ORIGINS", "https://a.example, https://b.example,")
    settings = read_settings()
    assert (settings.port, settings.dev) == (9000, True)
    assert settings.cors_origins == ("https://a.example", "https://b.example")


def test_a_file_is_read_and_the_environment_and_arguments_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_file(tmp_path, monkeypatch, "port: 9001\npartitions: 4\nhost: 0.0.0.0\ncors_origins: [a, b]")
    monkeypatch.setenv("INFERPIPE_PORT", "9000")
    settings = read_settings(partitions=2)
    assert (settings.port, settings.partitions, settings.host) == (9000, 2, "0.0.0.0")
    assert settings.cors_origins == ("a", "b")
    assert not settings.is_loopback


@pytest.mark.parametrize("text", ["prot: 1", "port: many", "[1, 2]", "just text"])
def test_a_file_that_is_wrong_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_file(tmp_path, monkeypatch, text)
    with pytest.raises(ValueError):  # noqa: PT011 - the message is pydantic's
        read_settings()


def test_an_empty_file_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_file(tmp_path, monkeypatch, "")
    assert read_settings() == Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_a_log_path_is_one_file_per_deployment() -> None:
    assert Settings().log_path("router") is None
    assert Settings(log_dir="logs").log_path("router") == Path("logs/router.log")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("INFERPIPE_REDIS_PASSWROD", "INFERPIPE_REDIS_PASSWORD"),
        ("INFERPIPE_APIKEY", "INFERPIPE_API_KEY"),
        ("INFERPIPE_RETENTION", "INFERPIPE_RETENTION_S"),
    ],
)
def test_a_misspelt_setting_is_refused_by_the_one_meant(
    monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "secret-value")
    with pytest.raises(ValueError, match=f"did you mean {meant}") as caught:
        read_settings()
    assert "secret-value" not in str(caught.value)


def test_an_unknown_name_that_is_near_none_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("INFERPIPE_FLUX_CAPACITOR", "1.21")
    read_settings()
    assert "INFERPIPE_FLUX_CAPACITOR is no setting" in caplog.text


def test_what_belongs_to_the_sdk_and_the_installer_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("BASE_URL", "ENVIRONMENT", "STAGING_API_KEY", "STAGING_TIMEOUT_S", "TORCH_INDEX"):
        monkeypatch.setenv(f"INFERPIPE_{name}", "x")
    read_settings()
    assert caplog.text == ""
