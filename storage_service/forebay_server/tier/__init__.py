"""Places that keep bytes: shared memory, directories, the object tier."""
