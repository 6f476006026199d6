"""A finished run on a hub: what goes where, whether it may go, and the talk with the hub's client."""
