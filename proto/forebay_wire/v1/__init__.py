"""Version 1 of the control protocol: the .proto files and the code generated from them."""
