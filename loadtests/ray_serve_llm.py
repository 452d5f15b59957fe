"""Ray Serve LLM, the peer of `loadtests.openai`, with its own settings as fast as they go.

A program of its own, because a process has one Ray: `python -m loadtests.ray_serve_llm MODEL NAME
PORT CONTEXT_MAX DIRECTORY`. It prints READY when it answers and ends when its standard input does.
Its answer batcher is off (by default it holds each chunk back for 50 ms) and HAProxy and Serve's
throughput mode are on, as in our service. It wants `pyarrow`, which our service does not.
"""

import os
import sys

FIRST_PORT = 31_000  # of ours begin at 20,000
BATCH_MS = 0


def main() -> None:
    """Serve until standard input ends."""
    model, name, port, context_max, directory = sys.argv[1:]
    ports = iter(map(str, range(FIRST_PORT, FIRST_PORT + 5)))
    os.environ.update(
        {
            "TMPDIR": directory,
            "VLLM_NO_USAGE_STATS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_METRICS_PORT": next(ports),
            "RAY_SERVE_HAPROXY_STATS_PORT": next(ports),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": next(ports),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": next(ports),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": next(ports),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(FIRST_PORT + 100),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/s",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/state",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        }
    )
    # Imported here: Ray reads those variables then.
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import HTTPOptions  # noqa: PLC0415
    from ray.serve.llm import LLMConfig, build_openai_app  # noqa: PLC0415

    ray.init(
        num_cpus=16, include_dashboard=False, _temp_dir=directory, _node_ip_address="127.0.0.1"
    )
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(port)))
        config = LLMConfig(
            model_loading_config={"model_id": name, "model_source": model},
            engine_kwargs={
                "enforce_eager": True,
                "max_num_seqs": 64,
                "max_model_len": int(context_max),
                "kv_cache_memory_bytes": 2**30,
                "scheduling_policy": "priority",
                "disable_log_stats": True,
            },
            placement_group_config={"bundles": [{"CPU": 1}]},
            deployment_config={"num_replicas": 1, "max_ongoing_requests": 1000},
            experimental_configs={"stream_batching_interval_ms": BATCH_MS},
            log_engine_metrics=False,
        )
        serve.run(build_openai_app({"llm_configs": [config]}))
        print("READY", flush=True)
        sys.stdin.read()
        serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
