"""Which layers are clustered, and how many bits each of them gets."""
