"""The daemon: tiers, catalog and the edges that clients talk to."""
