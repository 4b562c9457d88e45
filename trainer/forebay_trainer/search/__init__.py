"""Many runs of one recipe: over seeds, and over values of its keys."""
