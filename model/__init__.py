"""The network: configuration, layers, weight files, chat format. Imports nothing else of this project."""
