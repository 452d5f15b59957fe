"""The native API, by resource."""
