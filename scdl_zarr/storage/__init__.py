"""Floor 2: what is on disk, and where its bytes are."""
