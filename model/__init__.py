"""The network: configuration, layers, weight files, chat format. Imports only `common`."""
