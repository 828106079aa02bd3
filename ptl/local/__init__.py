"""One machine: run directories, servers, images."""
