"""Background work of the daemon, journaled in the catalog."""
