"""Foreign contracts, one file each."""
