"""Where a replica's own sockets are reached."""

import ray

from serve_app.settings import Settings


def own_address(settings: Settings) -> str:
    """The address that links bind to and advertise: the setting's, or else the node's."""
    return settings.link_host or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
