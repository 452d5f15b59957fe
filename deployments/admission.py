"""How this process asks the routers for a replica."""

from serve_app.adapters.serve_admission import Handle, ServeAdmission
from serve_app.adapters.tcp_admission import AdmissionLink
from serve_app.ports import Clock, Entropy
from serve_app.settings import Settings


def admission_of(
    settings: Settings, router: Handle, clock: Clock, entropy: Entropy
) -> ServeAdmission:
    """Admission at whichever router queues for a model."""
    secret = settings.cluster_secret.get_secret_value().encode()
    link = AdmissionLink(secret, clock, entropy)
    return ServeAdmission(router, settings.own_names, link, clock)
