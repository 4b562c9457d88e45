"""What trainers import: datasets, loaders and checkpoints, kept by a Forebay daemon."""
