"""The rounds of `torture`, a module for each kind: what is done to a store, and what must be true afterwards."""
