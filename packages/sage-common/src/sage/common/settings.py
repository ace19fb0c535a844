"""Settings: environment variables `SAGE_…` override `config.toml`, which overrides the defaults."""

import base64
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from sage.common.errors import ConfigError
from sage.common.fake_devices import parse_fake_devices
from sage.common.paths import get_user_paths
from sage.common.validation import config_error

#: File name of the SQLite database in the state folder.
DATABASE = "engines.db"
#: Settings whose values are never printed.
_SECRETS = frozenset({"api_key", "database_url", "webhook_urls", "webhook_secret"})
#: Minimum and maximum length of the key in `webhook_secret`.
#: Source: Standard Webhooks, specification 1.0.0, "Signature scheme".
_WEBHOOK_KEY_BYTES = (24, 64)


class Settings(BaseSettings):
    """All settings. Set them as `SAGE_<NAME>` in the environment or `<name>` in `config.toml`. Empty values are ignored."""

    model_config = SettingsConfigDict(env_prefix="SAGE_", env_ignore_empty=True, extra="forbid", frozen=True)

    gateway_host: str = Field("127.0.0.1", description="Address that the gateway listens on.")
    gateway_port: int = Field(8889, ge=1, le=65535, description="Port that the gateway listens on.")
    api_key: SecretStr | None = Field(
        None, description="API key that requests must contain; required if other machines can connect to the gateway."
    )
    database_url: str | None = Field(None, repr=False, description="SQLAlchemy URL of the database; default: SQLite.")
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Minimum level of the messages that are logged."
    )
    reconcile_seconds: float = Field(0.5, gt=0, le=60, description="Maximum seconds between two checks of the engines.")
    engine_start_seconds: float = Field(
        300, gt=0, description="Maximum seconds from the start of an inference engine until it answers."
    )
    stop_seconds: float = Field(
        20,
        gt=0,
        description="Seconds to wait for the exit of an inference engine that is stopped; then the engine is killed.",
    )
    engine_unresponsive_seconds: float = Field(
        30, gt=0, description="If an engine has not answered for this number of seconds, requests to it are rejected."
    )
    restart_policy: Literal["no", "on-failure", "unless-stopped"] | None = Field(
        None,
        description="When to restart engines. no: never. on-failure: after a failure. unless-stopped: after a failure or "
        "a reboot. Default: `unless-stopped` for training runs, `no` for other engines.",
    )
    on_busy: Literal["wait", "preempt", "share", "fail"] = Field(
        "wait", description="What a starting engine does if too little memory is free: wait, preempt, share or fail."
    )
    memory_limit_gb: float | None = Field(
        None, gt=0, description="Main memory that all engines together may use, in GB (10^9 bytes); default: all of it."
    )
    fake_devices: str | None = Field(
        None,
        description="Fake GPUs that replace this machine's GPUs, to try how engines are scheduled; for example 2x24GiB.",
    )
    paused_requests: Literal["hold", "reject"] = Field(
        "hold",
        description="What to do with requests to an engine that is paused to free memory for another engine: hold them for "
        "up to request_wait_seconds, or reject them with HTTP status 503.",
    )
    log_limit_mb: int = Field(100, ge=1, description="Maximum size of an engine's log, in MB (10^6 bytes).")
    max_request_mb: int = Field(32, ge=1, description="Maximum size of a request body, in MB (10^6 bytes).")
    max_engine_requests: int = Field(
        1024, ge=1, description="Maximum requests in progress per engine; further requests get HTTP status 429."
    )
    model_cache_gb: float = Field(
        50, gt=0, description="Maximum total size of the converted and merged copies of models, in GB (10^9 bytes)."
    )
    allow_reward_files: bool = Field(
        False, description="Allow training runs (method grpo) to execute Python files with reward functions."
    )
    training_threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each training run; default: the cores divided by the number of running engines.",
    )
    webhook_secret: SecretStr | None = Field(None, description="Secret key that signs the messages to webhook_urls.")
    webhook_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (), repr=False, description="URLs that receive a message when an engine runs, is paused, completes or fails."
    )
    request_wait_seconds: float = Field(60, ge=0, description="Maximum seconds that a request waits for a starting engine.")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value != ""}

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, key: SecretStr | None) -> SecretStr | None:
        text = key.get_secret_value() if key else "key"
        if not text.isascii() or not text.isprintable() or " " in text:  # the key is sent in an HTTP header
            raise ValueError("must be printable ASCII characters without spaces")
        return key

    @field_validator("webhook_urls", mode="before")
    @classmethod
    def _split_urls(cls, urls: Any) -> Any:
        return tuple(dict.fromkeys(filter(None, map(str.strip, urls.split(","))))) if isinstance(urls, str) else urls

    @field_validator("webhook_urls")
    @classmethod
    def _usable_urls(cls, urls: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if urls and info.data.get("webhook_secret", True) is None:
            raise ValueError("webhook_secret must be set too. To create a secret, run: openssl rand -base64 32")
        for parts in map(urlsplit, urls):
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be URLs that begin with http:// or https://, separated by commas")
        return urls

    @field_validator("webhook_secret")
    @classmethod
    def _usable_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            try:
                key = base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
            except ValueError:
                key = b""
            if not _WEBHOOK_KEY_BYTES[0] <= len(key) <= _WEBHOOK_KEY_BYTES[1]:
                raise ValueError("must be 24 to 64 bytes in base64. To create a secret, run: openssl rand -base64 32")
        return secret

    @field_validator("fake_devices")
    @classmethod
    def _parsable_devices(cls, text: str | None) -> str | None:
        if text is not None:
            parse_fake_devices(text)
        return text

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of settings in order of precedence: arguments, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, get_user_paths().config_file)

    @property
    def gateway_url(self) -> str:
        """Base URL of the gateway for clients on this machine."""
        host = "127.0.0.1" if self.gateway_host in ("0.0.0.0", "::", "") else self.gateway_host  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.gateway_port}"

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database_url or f"sqlite:///{get_user_paths().state_dir / DATABASE}"


def load_settings() -> Settings:
    """Return the current settings. Raises ConfigError if a setting or `config.toml` is invalid."""
    path = get_user_paths().config_file
    try:
        return Settings()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(path, str(error)) from error
    except ValidationError as error:
        raise _invalid(path, config_error(error, "setting", _SECRETS).message) from error


def _invalid(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        code="settings_invalid",
        message=f"A setting is invalid: {problem.rstrip('.')}.",
        hint=f"Correct the setting in {path} or in the environment variable of the setting (SAGE_…).",
    )
