"""Backends that take a machine's time and none of its work: for simulations under a `VirtualLoop`."""
