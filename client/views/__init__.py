"""Simulated artifacts on a site's own slices: what the agent trains on, and what simulations are made of."""
