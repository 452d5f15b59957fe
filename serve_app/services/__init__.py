"""Use cases over ports; no technology."""
