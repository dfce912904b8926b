"""The ops on each kind of device: the reference, which runs everywhere, and what is faster."""
