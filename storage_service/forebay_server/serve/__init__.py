"""Reading: which copy of which bytes a client gets, and what the daemon holds."""
