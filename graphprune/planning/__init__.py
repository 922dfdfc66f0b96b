"""What goes: from a request to a plan. `plan` and `prune` are in `request`."""
