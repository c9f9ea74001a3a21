"""A small project with the libraries whose files go through the package's storages."""
