"""Ray and Serve on this machine, started and stopped by us.

Owns Ray's environment (measured choices: HAProxy and throughput mode, one proxy thread, short
health checks), its temporary directory, and the end of every process it started. Invariant: ports
and directories are this cluster's own, so two can live on one host, and nothing is left behind.
"""

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation

from serve_app.adapters.system import SystemClock
from serve_app.settings import Settings

APP_NAME = "inferpipe"
LOGICAL_CPUS = 8  # deployments ask for small fractions; Ray must not count the two real cores
STOP_WAIT_S = 10.0
_PORTS = 200  # of one cluster: four for its proxies, the others for its ingress replicas


class ClusterFailedError(RuntimeError):
    """Ray or the application cannot be started; the message has the last words."""


class LocalCluster:
    """One Ray head with the application on it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Short, because Ray puts sockets below it and a socket's path has 107 bytes at most.
        self._temp_dir = Path(tempfile.mkdtemp(prefix="ip-"))
        self._children_before: set[int] = set()
        self.started_at_ms = SystemClock().now_ms()
        self.is_ready = False

    def start(self, build_app: Callable[[Settings], Application]) -> None:
        """Start Ray and deploy; returns when the deployment has begun.

        Raises:
            ClusterFailedError: Ray does not start.
        """
        os.environ.update(self._environment())
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(
                num_cpus=LOGICAL_CPUS,
                num_gpus=None if self._settings.device == "cuda" else 0,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(self._temp_dir),
                _node_ip_address="127.0.0.1",
            )
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host=self._settings.host, port=self._settings.port),
            )
            serve._run(  # noqa: SLF001 - `serve.run` waits, and shows nothing while it does
                build_app(self._settings), name=APP_NAME, route_prefix="/", _blocking=False
            )
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise ClusterFailedError(f"Ray does not start: {error}") from error

    def status(self) -> str:
        """The application's status in a word, or why it is not well.

        A replica that missed its health checks is replaced, which on a busy machine is no reason
        to give up: the caller waits as long as it waits for a start.

        Raises:
            ClusterFailedError: the deployment failed.
        """
        application = serve.status().applications.get(APP_NAME)
        if application is None:
            return "application: deploying"
        details = [application.message]
        details += [d.message for d in application.deployments.values() if d.message]
        if application.status == "DEPLOY_FAILED":
            raise ClusterFailedError("\n".join(details))
        self.is_ready = application.status == "RUNNING"
        said = f" ({' '.join(details)})" if application.status == "UNHEALTHY" else ""
        return f"application: {application.status.lower()}{said}"

    def stop(self) -> None:
        """End everything that `start` began, by force after a while."""
        self.is_ready = False
        ours = self._descendants()
        if ray.is_initialized():
            with contextlib.suppress(Exception):  # a broken cluster is ended by its processes
                serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
        ours |= self._descendants()
        _, alive = psutil.wait_procs(ours, timeout=STOP_WAIT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=STOP_WAIT_S)
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _descendants(self) -> set[psutil.Process]:
        """Ray's processes below us: all children but the store, which has its own keeper."""
        found: set[psutil.Process] = set()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "valkey-server" not in child.name():
                    found.add(child)
        return found

    def _environment(self) -> dict[str, str]:
        files = self._temp_dir / "h"
        files.mkdir(exist_ok=True)
        fallback_http, fallback_grpc, metrics, stats, first = _free_ports()
        return {
            # vLLM leaves sockets and a rendezvous file behind wherever temporary files go.
            "TMPDIR": str(files),
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            # To the discard port: its lines hold whole URLs, and a stream token may stand in one.
            "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:9",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "s"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "2",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _PORTS - 5),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "2",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
        }


def _free_ports() -> range:
    """Five free ports in a row, the last of which begins the ingress replicas' range.

    Below the ephemeral range: a port from there may be some connection's own end by the time that
    HAProxy wants it.
    """
    for first in range(20_000, 32_000, _PORTS):
        ports = range(first, first + 5)
        with contextlib.ExitStack() as stack:
            try:
                for port in (*ports, *range(ports.stop, ports.stop + 4)):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return ports
    raise ClusterFailedError("no free range of ports below 32000")
