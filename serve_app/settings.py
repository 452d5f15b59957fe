"""Every setting of the service: one frozen tree, read once, handed down.

Longer than 400 lines because one page has every setting.

Owns names, defaults, bounds and reasons. Each is an environment variable, `INFERPIPE_` and the
name in capitals, or a key of the YAML file that `INFERPIPE_CONFIG` names. Invariant: nothing else
in the service reads the environment.
"""

import difflib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from serve_app.core.egress import parse_networks
from serve_app.served_model import ServedModel

logger = logging.getLogger(__name__)

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
_PREFIX = "INFERPIPE_"
# In the same environment, but the installer's, the SDK's and the command's.
_FOREIGN = frozenset(
    {"CONFIG", "TORCH_INDEX", "ENGINE", "BASE_URL", "ENVIRONMENT", "TIMEOUT_S", "RETRIES"}
)
_PROFILED = ("_API_KEY", "_BASE_URL", "_WORKSPACE_ID", "_TIMEOUT_S", "_RETRIES")
_NEAR = 0.8  # of difflib: one or two letters off
KEY_LENGTH_MIN = 16
KEY_LENGTH_MAX = 128


class Settings(BaseSettings):
    """What an operator can set; the defaults make a laptop's quick start."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # a key that is refused must not stand in a log
    )

    host: str = Field("127.0.0.1", description="Address the HTTP port binds to.")
    port: int = Field(8000, ge=1, le=65535, description="The one HTTP port.")
    public_url: str = Field("", description="How clients reach us, when a proxy stands before.")
    dev: bool = Field(
        default=False,
        description="Local development: a request with no key acts as an `execute` key of the "
        "default workspace; only with a loopback Host and no foreign Origin.",
    )
    api_key: SecretStr = Field(
        SecretStr(""),
        description="The first admin key, 16 to 128 printable characters; none: one is made and "
        "printed once.",
    )
    workspace_id: str = Field(
        "default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="The first key's workspace."
    )
    data_dir: Path = Field(
        Path.home() / ".inferpipe", description="Models, the embedded store, logs, secrets."
    )
    cluster_secret: SecretStr = Field(
        SecretStr(""),
        description="Authenticates the links between our processes; none: one is made and kept in "
        "the data directory. Several hosts must share it.",
    )
    log_dir: Path | None = Field(
        None,
        description="Where each deployment appends its log; none: standard error. `inferpipe up` "
        "takes `logs` in the data directory.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins a browser may call from, comma-separated."
    )
    egress_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Networks that webhooks, HTTP steps and file fetches may reach although they "
        "are private, comma-separated, such as `127.0.0.1/32`.",
    )
    http_answer_max_bytes: int = Field(
        1 << 20, ge=1024, description="Largest body that an `http` step takes as an answer."
    )
    workflows_dir: Path | None = Field(
        None, description="A directory of your own definitions (*.yaml), read at start."
    )
    metrics_open: bool = Field(
        default=False,
        description="`/metrics` without a key although the port is not bound to loopback.",
    )
    timeout_default_ms: int = Field(
        3_600_000, ge=1, description="Deadline of an execution that names none."
    )
    body_max_bytes: int = Field(10 << 20, ge=1024, description="Largest request body.")
    signal_max_bytes: int = Field(
        64 << 10, ge=64, description="Largest body of a signal; it stands in the journal."
    )
    json_depth_max: int = Field(64, ge=4, le=512, description="Deepest nesting of a JSON body.")
    keep_alive_s: float = Field(10.0, gt=0, le=15, description="Silence on a stream at most.")
    stream_token_ttl_max_s: int = Field(
        3600, ge=1, le=86400, description="Longest life of a stream token."
    )
    rate_limit_requests: int = Field(
        0, ge=0, description="Requests per window of a key without a limit of its own; 0: any."
    )
    rate_limit_window_s: float = Field(60.0, gt=0, description="That window.")
    requests_max: int = Field(
        4096, ge=1, description="Requests and open streams in one ingress replica."
    )

    sockets_max: int = Field(1000, ge=1, description="WebSockets in one ingress replica.")
    socket_requests_max: int = Field(64, ge=1, description="Requests at once on one WebSocket.")
    socket_message_bytes_max: int = Field(
        1 << 20, ge=1024, le=16 << 20, description="Largest message a WebSocket takes."
    )
    socket_auth_s: float = Field(
        10.0, gt=0, description="A WebSocket that has not said who it is by then is closed."
    )
    socket_idle_s: float = Field(
        600.0, gt=0, description="A WebSocket without a message or a request is closed after it."
    )
    socket_stall_s: float = Field(
        30.0, gt=0, description="A WebSocket client that reads nothing for so long is cut off."
    )

    session_messages_max: int = Field(
        200, ge=2, le=10_000, description="Messages in one session; a turn adds two."
    )
    session_bytes_max: int = Field(
        1 << 20, ge=1024, le=64 << 20, description="Text in one session."
    )
    session_idle_s: int = Field(
        86_400, ge=1, description="A session without a turn for so long is gone."
    )
    session_waiting_max: int = Field(
        8, ge=0, description="Turns of one session that wait for the one that runs."
    )

    redis_url: SecretStr = Field(
        SecretStr(""),
        description="redis:// or rediss:// address of a server, or of a node of a Redis Cluster "
        "(several: comma-separated); none: the embedded server.",
    )
    redis_username: str = Field("", description="ACL user, where the address names none.")
    redis_password: SecretStr = Field(
        SecretStr(""), description="Password, where the address holds none."
    )
    redis_ca_file: Path | None = Field(
        None, description="Certificates to trust for rediss://; none: the system's."
    )
    redis_cert_file: Path | None = Field(
        None, description="Our own certificate, where the server asks for one."
    )
    redis_key_file: Path | None = Field(None, description="The key of our certificate.")
    redis_ack_replicas: int = Field(
        0,
        ge=0,
        le=5,
        description="Replicas that must have a write before it is acknowledged (WAIT). Without, a "
        "fail-over to a replica may lose acknowledged work.",
    )
    redis_fsync: Literal["always", "everysec"] = Field(
        "always",
        description="Of the embedded server. `everysec` may lose up to 2 s of acknowledged work.",
    )
    partitions: int = Field(16, ge=1, le=256, description="Fixed for the life of the store.")
    backlog_max: int = Field(
        10_000, ge=1, description="Executions waiting in one partition; beyond its share of it 503."
    )
    payload_inline_bytes: int = Field(
        65_536,
        ge=1024,
        description="A stored record above it keeps its large members apart, to be read only where "
        "they are needed.",
    )
    input_max_bytes: int = Field(
        8 << 20, ge=1024, description="Largest input of an execution, as JSON; beyond it 413."
    )
    result_max_bytes: int = Field(
        8 << 20, ge=1024, description="Largest result, of a step or an execution, as JSON."
    )
    flow_waiting_max: int = Field(
        1_000, ge=0, description="Executions in line before one concurrency limit or cache entry."
    )
    flow_ahead_s: int = Field(
        600, ge=0, description="How far ahead of a workflow's rate limit an execution is accepted."
    )
    event_max_bytes: int = Field(
        256 << 10, ge=256, le=1 << 20, description="Largest event, as JSON; beyond it 413."
    )
    events_batch_max: int = Field(500, ge=1, le=10_000, description="Events in one request.")
    events_kept_max: int = Field(
        16_000,
        ge=256,
        description="Events kept of one workspace. Each partition has its share.",
    )
    hook_tolerance_s: int = Field(
        300, ge=1, le=3600, description="How far from now a webhook that comes in may be dated."
    )
    events_retention_s: int = Field(
        86400, ge=60, description="How long an event is kept, to be heard by who comes late."
    )
    retention_s: int = Field(
        7 * 86400, ge=60, description="How long an ended execution can be read."
    )
    executions_kept_max: int = Field(
        1_000_000,
        ge=256,
        description="Executions of one workspace; beyond it the oldest that has ended is forgotten "
        "before its time. Each partition has its share.",
    )
    usage_retention_days: int = Field(
        400, ge=1, le=3660, description="How long token counts can be read at `/v1/usage`."
    )

    ingress_replicas: int = Field(1, ge=1, description="HTTP processes.")
    executor_replicas: int = Field(2, ge=1, description="Two, so that one takes over at once.")
    executor_capacity: int = Field(512, ge=1, description="Executions one executor owns at once.")
    lease_ttl_ms: int = Field(
        3_000, ge=200, description="An executor silent for so long loses what it owns."
    )
    heartbeat_ms: int = Field(500, ge=20, description="How often an executor shows it lives.")

    dispatcher_replicas: int = Field(1, ge=0, description="Webhook dispatchers; 0: none is sent.")
    webhooks_max: int = Field(64, ge=1, le=1000, description="Webhooks in one workspace.")
    webhook_timeout_s: float = Field(
        15.0, gt=0, le=60, description="For a receiver's whole answer; a later 2xx is a failure."
    )
    webhook_retry_s: Annotated[tuple[float, ...], NoDecode] = Field(
        (5, 30, 120, 600, 1800, 7200, 21600, 43200),
        description="Seconds before each further try of a delivery (±20 %), comma-separated; then "
        "it is dead.",
    )
    webhook_inflight_max: int = Field(
        256, ge=1, le=1000, description="Deliveries one dispatcher sends at once."
    )
    webhook_endpoint_inflight_max: int = Field(
        16, ge=1, description="Deliveries to one endpoint at once, while it answers well."
    )
    webhook_backlog_max: int = Field(
        200_000, ge=1, description="Deliveries that wait for one endpoint; more are dead at once."
    )
    webhook_retention_s: int = Field(
        3 * 86400, ge=60, description="How long an ended delivery can be seen and replayed."
    )
    webhook_disable_after_s: int = Field(
        5 * 86400, ge=60, description="An endpoint that only failed for so long is disabled."
    )
    webhook_output_max_bytes: int = Field(
        256 * 1024, ge=0, description="A larger output is left out of deliveries: `outputUrl`."
    )
    webhook_lease_ms: int = Field(
        5_000, ge=500, description="A dispatcher silent for so long loses what it was sending."
    )

    model: str = Field(
        "", description="A model directory or hub name; none: the bundled SmolLM2-135M-Instruct."
    )
    model_name: str = Field(
        "",
        description="Its ids in the API, comma-separated, its own first; none: the directory's "
        "name.",
    )
    model_replicas: int = Field(1, ge=0, description="Engines; 0: no model plane.")
    models: tuple[ServedModel, ...] = Field(
        (),
        description="Several models, the default one first: a list of `name`, `path`, `aliases`, "
        "`replicas` and engine settings of their own ([models.md](models.md)); as JSON in the "
        "environment. None: the one of the three settings above.",
    )
    model_runner: Literal["auto", "generate", "pooling"] = Field(
        "auto",
        description="What the model is for, under vLLM's names: to `generate` text, or `pooling`, "
        "which gives embeddings; auto: what vLLM takes it for.",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="What vLLM runs on.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Weights.")
    context_max: int = Field(
        0, ge=0, description="Longest prompt and answer, in tokens; 0: what the model allows."
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a CPU engine.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory.")
    engine_threads: int = Field(
        0,
        ge=0,
        description="Cores a CPU engine computes on, each bound to its own; 0: all but one, or an "
        "equal part of them where several engines run on this machine.",
    )
    engine_seqs_max: int = Field(64, ge=1, description="Requests in one engine step.")
    engine_eager: bool = Field(
        default=True, description="No compilation: a CPU engine starts in 20 s, not in minutes."
    )
    engine_stall_s: float = Field(
        60.0, gt=1, description="No engine step for so long while requests run: the engine is ill."
    )
    router_replicas: int = Field(
        1, ge=1, description="Routers; the requests of one model all go to one of them."
    )
    admit_wait_s: float = Field(
        60.0, gt=0, description="How long a request waits for room at a model replica; then 503."
    )
    admit_queue_max: int = Field(
        4096, ge=1, description="Requests that wait for room, of all workspaces; beyond it 503."
    )
    admit_workspace_queue_max: int = Field(
        2048, ge=1, description="Requests of one workspace that wait for room; beyond it 429."
    )
    workspace_tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Tokens, prompts and answers, that one workspace may use of a model in a "
        "minute; beyond it 429. 0: no limit.",
    )
    resume_wait_s: float = Field(
        90.0,
        ge=0,
        description="How long an answer whose replica was lost waits for another to go on.",
    )
    region: str = Field("", description="Where the model replicas of this configuration run.")
    stake: str = Field(
        "0",
        pattern=r"^\d{1,30}(\.\d{1,18})?$",
        description="What stands behind each model replica, a decimal number; callers may demand "
        "a least one.",
    )
    openai: bool = Field(
        default=True,
        description="OpenAI's API. vLLM's serving code takes 0.5 GB in each ingress process.",
    )
    tool_parser: str = Field(
        "hermes",
        description="How the model writes tool calls, under vLLM's names; empty: it cannot.",
    )
    reasoning_parser: str = Field(
        "", description="How the model writes its reasoning, under vLLM's names; empty: not at all."
    )
    link_host: str = Field(
        "127.0.0.1",
        description="Address the links between processes bind to; empty: the node's own.",
    )

    @field_validator("models")
    @classmethod
    def _have_names_of_their_own(cls, models: tuple[ServedModel, ...]) -> tuple[ServedModel, ...]:
        names = [name for one in models for name in (one.name, *one.aliases)]
        if len(set(names)) != len(names):
            raise ValueError("two models share a name")
        return models

    @field_validator("api_key")
    @classmethod
    def _is_printable(cls, key: SecretStr) -> SecretStr:
        value = key.get_secret_value()
        if value and not (KEY_LENGTH_MIN <= len(value) <= KEY_LENGTH_MAX and value.isprintable()):
            raise ValueError("INFERPIPE_API_KEY takes 16 to 128 printable characters")
        return key

    @field_validator("egress_allow")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        parse_networks(networks)
        return networks

    @field_validator("cors_origins", "egress_allow", "webhook_retry_s", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    def log_path(self, name: str) -> Path | None:
        """Where a deployment's log goes; None for standard error."""
        return None if self.log_dir is None else self.log_dir / f"{name}.log"

    @property
    def model_names(self) -> tuple[str, ...]:
        """The model's ids in the API, its own first."""
        return tuple(name.strip() for name in self.model_name.split(",") if name.strip())

    def of_each_model(self) -> tuple["Settings", ...]:
        """Settings of one model each, the default one's first; none without a model plane."""
        if not self.models:
            return (self,) if self.model_replicas else ()
        return tuple(
            self.model_copy(update={**one.as_settings(), "models": ()}) for one in self.models
        )

    @property
    def own_names(self) -> dict[str, str]:
        """By each id of each model, the model's own."""
        every = [one.model_names for one in self.of_each_model()]
        return {name: names[0] for names in every for name in names}

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach us."""
        return self.host in LOOPBACK_HOSTS


def read_settings(**given: object) -> Settings:
    """The settings of this process: what is given first, then the environment, then the file.

    Raises:
        ValueError: a value out of bounds, an unknown key in the file, or a variable whose name is
            nearly that of a setting.
    """
    _check_names(os.environ)
    path = os.environ.get("INFERPIPE_CONFIG")
    if not path:
        return Settings(**given)  # type: ignore[arg-type]
    document = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no mapping of settings")  # noqa: TRY004 - one kind of error for settings
    from_env = {name for name in Settings.model_fields if f"INFERPIPE_{name.upper()}" in os.environ}
    from_file = {name: value for name, value in document.items() if name not in from_env}
    return Settings(**{**from_file, **given})


def _check_names(environment: Iterable[str]) -> None:
    """Let no misspelt setting pass in silence: it may be the one that keeps others out."""
    known = [name.upper() for name in Settings.model_fields]
    for variable in sorted(environment):
        name = variable.removeprefix(_PREFIX)
        if name == variable or name in known or name in _FOREIGN or name.endswith(_PROFILED):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
        if near:
            raise ValueError(f"{variable} is no setting; did you mean {_PREFIX}{near[0]}?")
        logger.warning("%s is no setting and has no effect; see docs/settings.md", variable)
