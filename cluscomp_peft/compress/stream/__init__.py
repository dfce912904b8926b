"""From the dense checkpoint to packed shards, a block at a time, resumable."""
