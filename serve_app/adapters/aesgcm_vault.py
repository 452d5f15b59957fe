"""Vault with AES-256-GCM under a key derived from the cluster secret.

Owns the form of what is sealed: `v1.` and base64url of nonce and ciphertext. Invariant: the
context (whose it is) is authenticated, so that a text moved to another tenant's record does not
open.
"""

import base64
import binascii

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from serve_app.core.errors import SealBrokenError
from serve_app.ports import Entropy

_VERSION = "v1."
_KEY_BYTES = 32
_NONCE_BYTES = 12  # random: safe for some 2**32 seals under one key (NIST SP 800-38D)


class AesGcmVault:
    """One key for the life of a process."""

    def __init__(self, secret: bytes, entropy: Entropy) -> None:
        derivation = HKDF(SHA256(), _KEY_BYTES, salt=None, info=b"inferpipe: secrets at rest, v1")
        self._cipher = AESGCM(derivation.derive(secret))
        self._entropy = entropy

    def seal(self, data: bytes, context: str) -> str:
        """See `ports.Vault`."""
        nonce = base64.urlsafe_b64decode(f"{self._entropy.token()}==")[:_NONCE_BYTES]
        sealed = nonce + self._cipher.encrypt(nonce, data, context.encode())
        return _VERSION + base64.urlsafe_b64encode(sealed).decode()

    def open(self, sealed: str, context: str) -> bytes:
        """See `ports.Vault`."""
        try:
            raw = base64.urlsafe_b64decode(sealed.removeprefix(_VERSION))
            return self._cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], context.encode())
        except (InvalidTag, ValueError, binascii.Error) as error:
            raise SealBrokenError(
                "a stored secret cannot be read: was INFERPIPE_CLUSTER_SECRET changed?"
            ) from error
