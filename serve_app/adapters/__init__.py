"""The outside world, one file per technology and port."""
